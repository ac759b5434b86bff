"""Resolve a request of `sleb search`: to the settings of a search, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from sleb_cli.checks.clashes import given
from sleb_cli.checks.searches import CheckedSearch, goal_of
from sleb_cli.engine.device import choose_device, dtype_name, parse_dtype
from sleb_cli.engine.door.files import require_blocks
from sleb_cli.engine.door.named_model import needs_language_head, read_model
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.experts import Experts, expert_parameters, find_experts
from sleb_cli.engine.model.sizes import PerBlock, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.experts import ExpertMethod
from sleb_cli.engine.search.journal import recorded_settings
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.settings import BlockMethod, Method, Search
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget, Target, most_removals
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.text.settings import (
    CalibrationSettings,
    require_given_text,
    resolve_calibration,
)
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import MetricRecord, TargetRecord
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import (
    AUTO,
    DEFAULT_READER_METRIC,
    DEFAULT_SAMPLE_TOKENS,
    DEFAULT_SERVE_LENGTH,
    SearchRequest,
    Unit,
    journal_of,
)
from sleb_cli.units import format_bytes, format_count, plural
from sleb_plugins import (
    ExpertMetric,
    LogitMetric,
    MachineError,
    ModelMetric,
    OutputMetric,
    UnsupportedModelError,
    UsageError,
)
from sleb_plugins.errors import did_you_mean


def resolve_search(
    checked: CheckedSearch,
    source: ModelSource,
    registry: Registry,
    notify: Notify,
    group: ProcessGroup,
) -> Search:
    """Settle a search by the model's architecture."""
    request = _restore_settings(checked.request)
    checked = replace(checked, request=request)
    device = choose_device(request.device)
    architecture = group.main_first(lambda: _read_model(checked, source, registry, notify))
    checked = _with_fitting_metric(checked, architecture, registry)
    request = checked.request
    metric = checked.metric
    placement = group.from_main(
        lambda: place_model(
            architecture,
            device,
            request.dtype or AUTO,
            notify,
            device_map=request.device_map,
            stream=request.stream,
        )
    )
    placement = replace(placement, device=device)
    if placement.stream and isinstance(metric, ModelMetric):
        error = UsageError if request.stream else MachineError
        raise error(
            f"{metric.name} runs the whole model, but the model is streamed block by block.",
            hint="Use a machine with more memory, or --device-map.",
        )
    text = _calibration_settings(request, architecture, placement)
    implementation = registry.metric_record(metric)
    method = _METHODS[request.unit](checked, implementation, architecture, notify)
    sample_tokens = request.sample_tokens
    if architecture.reading:
        sample_tokens = 0
    elif sample_tokens is None:
        # A streamed model would be read whole for each token.
        sample_tokens = 0 if placement.stream else DEFAULT_SAMPLE_TOKENS
    return Search(
        architecture,
        placement,
        checked.memory,
        request.batch_size,
        text,
        method,
        checked.extended,
        request.plan_file,
        request.resume,
        request.options,
        registry.third_party(),
        sample_tokens,
    )


def _with_fitting_metric(
    checked: CheckedSearch, architecture: Architecture, registry: Registry
) -> CheckedSearch:
    """Give a model that only reads its default metric, and refuse what is for another model."""
    request = checked.request
    metric = checked.metric
    if architecture.reading is None:
        if isinstance(metric, OutputMetric):
            name = architecture.source.id
            raise UsageError(
                f"{metric.name} scores models that only read; {name} is a language model.",
                hint="Use --metric kl.",
            )
        return checked
    if not checked.metric_given:
        metric = registry.metric(DEFAULT_READER_METRIC)
        request = replace(request, metric=metric.name)
    if isinstance(metric, LogitMetric | ModelMetric):
        raise UsageError(
            needs_language_head(metric.name, architecture),
            hint=f"Leave out --metric, which is then {DEFAULT_READER_METRIC}.",
        )
    refused = given(request, "max_perplexity_ratio target_memory unit=*")
    if request.sample_tokens:
        refused += given(request, "sample_tokens")
    if refused:
        raise UsageError(
            needs_language_head(refused[0], architecture),
            hint="Use --remove, --ratio or --target-params.",
        )
    return replace(checked, request=request, metric=metric)


def _block_method(
    checked: CheckedSearch,
    implementation: MetricRecord,
    architecture: Architecture,
    notify: Notify,
) -> BlockMethod:
    request = checked.request
    removable = Removable(architecture, _protection(request, architecture), notify)
    gone = checked.extended.removals if checked.extended else ()
    target = parse_target(request, architecture, notify)
    remove = most_removals(target, removable, checked.strategy, gone, notify)
    removable.candidates(gone)  # raises now if no block can be removed
    return BlockMethod(
        checked.metric,
        implementation,
        checked.strategy,
        request.holdout or 0.0,
        removable,
        bool(request.fast),
        target,
        remove,
    )


def _expert_method(
    checked: CheckedSearch,
    implementation: MetricRecord,
    architecture: Architecture,
    notify: Notify,
) -> ExpertMethod:
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its experts cannot be scored.",
            hint="Search the model that it was quantized from, and use the plan on this one with "
            "--any-model.",
        )
    request = checked.request
    metric = checked.metric
    assert isinstance(metric, ExpertMetric)
    fewer, target = experts_to_remove(request, architecture, notify)
    holdout = request.holdout or 0.0
    return ExpertMethod(metric, implementation, checked.strategy, holdout, fewer, target)


_METHODS: Mapping[Unit, Callable[..., Method]] = {
    "blocks": _block_method,
    "experts": _expert_method,
}


def experts_to_remove(
    request: SearchRequest, architecture: Architecture, notify: Notify
) -> tuple[int, TargetRecord | None]:
    """Return the number of experts to remove from each block, and the target if it is a size."""
    experts = find_experts(architecture)
    name, goal = goal_of(request)
    target: Target | None = None
    if name == "ratio":
        needed = math.ceil(goal * experts.count)
    elif name == "remove":
        needed = int(goal)
    else:
        target = parse_target(request, architecture, notify)
        assert isinstance(target, SizeTarget)
        dense = target.sizes.without(())
        step = expert_parameters(architecture)
        if name == "target_memory":
            step *= _served_dtype(request, architecture).itemsize
        needed = math.ceil((dense - target.limit) / step)
        if needed < 1:
            raise UsageError(
                f"The model is already at {target.describe(dense)}.",
                hint="Nothing needs to be removed.",
            )
    # Each group loses as many.
    fewer = math.ceil(needed / experts.groups) * experts.groups
    limit = (experts.count - 2 * experts.active) // experts.groups * experts.groups
    if fewer > limit:
        hint = "Remove blocks: leave out --unit experts."
        if limit > 0:
            hint = f"At most {limit} can go."
        raise UsageError(
            f"Cannot remove {fewer} of the {experts.count} experts of each block: a token uses "
            f"{experts.active}, and at least twice as many must stay.",
            hint=hint,
        )
    _note_rounding(experts, needed, fewer, notify)
    if not isinstance(target, SizeTarget):
        return fewer, None
    return fewer, TargetRecord(
        name=name,
        limit=target.limit,
        dense=dense,
        reached=dense - fewer * step,
        kv_cache=target.kv_cache,
    )


def _note_rounding(experts: Experts, needed: int, fewer: int, notify: Notify) -> None:
    """Say why more experts go than were asked for, and suggest a power of two for the rest."""
    if fewer > needed:
        notify(
            Notice(
                f"{fewer} experts of each block go, not {needed}: as many of each of "
                f"{experts.groups} groups."
            )
        )
    rest = experts.count - fewer
    power = 1 << (rest.bit_length() - 1)
    near = min((power, 2 * power), key=lambda count: abs(count - rest))
    is_close = 0 < abs(near - rest) <= rest / 8
    if is_close and 2 * experts.active <= near < experts.count:
        notify(
            Notice(
                f"{rest} experts stay; engines have faster kernels for {near}: --remove "
                f"{experts.count - near}."
            )
        )


def _calibration_settings(
    request: SearchRequest, architecture: Architecture, placement: Placement
) -> CalibrationSettings:
    text = resolve_calibration(
        architecture,
        request.calibration,
        request.samples,
        request.sequence_length,
        request.seed,
        request.chat,
        request.prompt,
    )
    if placement.stream:  # writing each token would read the whole model
        require_given_text(text)
    # A template's tokens cost most of the loss, and the model never writes them.
    return replace(text, own_answers=True)


def _restore_settings(request: SearchRequest) -> SearchRequest:
    # Free memory decides these two options, and may be another when a search is resumed.
    if not request.resume:
        return request
    before = recorded_settings(journal_of(request.plan_file))
    unset = {name: value for name, value in before.items() if getattr(request, name) is None}
    return replace(request, **unset)


def _read_model(
    checked: CheckedSearch, source: ModelSource, registry: Registry, notify: Notify
) -> Architecture:
    architecture = read_model(checked.named, source, registry, notify)
    if architecture.block_count < 2:
        blocks = plural(architecture.block_count, "block")
        raise UnsupportedModelError(
            f"Nothing can be removed from {architecture.source.id}, which has {blocks}.",
            hint="Name a model of two blocks or more.",
        )
    return architecture


def _protection(request: SearchRequest, architecture: Architecture) -> Protection:
    require_blocks(request, architecture.source, architecture.block_count)
    names_of = [{kind, *kind.split(", ")} for kind in architecture.kinds]
    known = sorted(set().union(*names_of) - {""})
    unknown = [kind for kind in request.protect_kind if kind not in known]
    if unknown:
        otherwise = None
        if not known:
            otherwise = "All its blocks are of one kind: use --protect 5,11."
        raise UsageError(
            f"{architecture.source.id} has no blocks of kind {unknown[0]!r}.",
            hint=did_you_mean(unknown[0], known, otherwise),
        )
    protected = set(request.protect or ())
    for block, names in enumerate(names_of):
        if names.intersection(request.protect_kind):
            protected.add(block)
    return Protection(
        request.protect_first or 0, request.protect_last or 0, tuple(sorted(protected))
    )


def parse_target(request: SearchRequest, architecture: Architecture, notify: Notify) -> Target:
    """Return the target, with its sizes by block."""
    name, goal = goal_of(request)
    if name in ("ratio", "remove"):
        blocks = architecture.block_count
        if name == "ratio":
            goal *= blocks
        remaining = max(0, blocks - math.ceil(goal))
        count = PerBlock(0, (1,) * blocks)
        return SizeTarget(name, count, remaining, lambda n: f"{n:g} of {blocks} blocks")
    if name == "target_params":
        sizes = count_parameters(architecture)
        return SizeTarget(name, sizes, float(goal), lambda n: f"{format_count(n)} parameters")
    if name == "target_memory":
        return _memory_target(int(goal), request, architecture, notify)
    return PerplexityTarget(float(goal))


def _served_dtype(request: SearchRequest, architecture: Architecture) -> torch.dtype:
    # The search may compute in a wider data type than the checkpoint's, on a processor without its
    # arithmetic.
    checkpoint = parse_dtype(AUTO, architecture.dtype)
    computed = parse_dtype(request.dtype or AUTO, checkpoint)
    return min(computed, checkpoint, key=lambda dtype: dtype.itemsize)


def _memory_target(
    limit: int, request: SearchRequest, architecture: Architecture, notify: Notify
) -> SizeTarget:
    """Count the weights and the KV cache of one sequence, as served."""
    served = _served_dtype(request, architecture)
    length = choose_length(
        request.serve_length, architecture, DEFAULT_SERVE_LENGTH, "--serve-length"
    )
    kv_cache = f"a KV cache in {dtype_name(served)} for {length} tokens"
    if architecture.is_quantized:
        weights = stored_bytes(architecture)
        form = "packed as in the checkpoint"
    else:
        weights = count_parameters(architecture) * served.itemsize
        form = f"in {dtype_name(served)}"
    cache = cache_bytes(architecture, served, length)
    counted = f"the weights {form} ({format_bytes(weights.without(()))})"
    notify(Notice(f"Memory counts {counted} and {kv_cache} ({format_bytes(cache.without(()))})."))
    return SizeTarget("target_memory", weights + cache, limit, format_bytes, kv_cache)
