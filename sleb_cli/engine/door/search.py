"""The door of `sleb search`: a request becomes the settings of a search before any weight is read."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

from sleb_cli.atomic import require_new_file
from sleb_cli.engine.device import choose_device, dtype_name, parse_dtype
from sleb_cli.engine.door.options import require_one_placement
from sleb_cli.engine.forward.placement import Placement, place_model
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.sizes import PerBlock, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.model.source import DEMO, locate_model
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import journal_of, recorded
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.settings import SearchSettings
from sleb_cli.engine.search.strategies import STRATEGIES, strategy_name
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget, Target, count_removals, option_of
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import require_same_code, require_same_model
from sleb_cli.engine.text.settings import REFERENCE_PRESETS, require_given_text, resolve_calibration
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Event, Notice, Notify
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import is_main_process
from sleb_cli.requests import (
    AUTO,
    DEFAULT_METRIC,
    DEFAULT_PROTECTED,
    DEFAULT_SAMPLE_TOKENS,
    DEFAULT_SERVE_LENGTH,
    DEFAULT_STRATEGY,
    TARGET_NAMES,
    SearchRequest,
    StrategyName,
    TargetName,
)
from sleb_cli.units import format_bytes, format_count, parse_bytes, parse_count, parse_ratio, plural
from sleb_plugins import LogitMetric, MachineError, Metric, ModelMetric, OutputError, UnsupportedModelError, UsageError
from sleb_plugins.errors import did_you_mean


def resolve_search(request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup) -> SearchSettings:
    """Validate the request before loading weights; workers use the main process's placement.

    Raises:
        SlebError: a subclass that fits, if the request is impossible.
    """
    settings = group.main_first(lambda: _resolve(request, registry, notify))
    placement = group.from_main(lambda: settings.placement)
    return replace(settings, placement=replace(placement, device=settings.placement.device))


def _resolve(request: SearchRequest, registry: Registry, notify: Notify) -> SearchSettings:
    """Check the request alone first."""
    quiet_libraries()
    target_name, plan_file = chosen_target(request), request.plan_file
    extended = read_plan(request.extend) if request.extend is not None else None
    request = _fill_gaps(request, extended)
    metric, strategy = registry.metric(str(request.metric)), strategy_name(str(request.strategy))
    if request.fast is None:
        # The demo is a first impression: it must not take long.
        request = replace(request, fast=request.model == DEMO and can_race(metric, strategy))
    _require_coherent(request, metric, strategy)
    memory = None if request.memory is None else parse_bytes(str(request.memory), "--memory")
    asked = _asked(request, target_name)
    speedup = float(asked) if target_name == "target_speedup" else None
    if is_main_process():
        _require_place(request)
    device = choose_device(request.device)  # one that is not there is reported before the model is looked for
    architecture = _read_architecture(request, extended, registry, notify)
    protection = Protection(request.protect_first or 0, request.protect_last or 0, _protected(request, architecture))
    removable = Removable(architecture, protection, notify)
    placement = place_model(
        architecture, device, str(request.dtype), notify, device_map=request.device_map, stream=request.stream
    )
    _require_runnable(request, metric, placement)
    text = resolve_calibration(
        architecture, request.calibration, request.samples, request.sequence_length, request.seed, request.chat
    )
    if placement.stream:
        require_given_text(text)
    target = parse_target(request, target_name, architecture, notify)
    gone = extended.removals if extended else ()
    remove = count_removals(target, removable, strategy, gone, notify) if target else 0
    removable.candidates(gone)  # raises now if no block can be removed
    sample = 0 if placement.stream else DEFAULT_SAMPLE_TOKENS  # each token would read the whole model
    return SearchSettings(
        architecture=architecture,
        placement=placement,
        # A template's tokens cost most of the loss, and the model never writes them.
        text=replace(text, own_answers=True),
        metric=metric,
        implementation=registry.metric_record(metric),
        strategy_name=strategy,
        removable=removable,
        target=target,
        remove=remove,
        options=request.options,
        plan_file=plan_file,
        resume=request.resume,
        extended=extended,
        speedup=speedup,
        fast=bool(request.fast),
        holdout=request.holdout or 0.0,
        sample_tokens=sample if request.sample_tokens is None else request.sample_tokens,
        memory=memory,
        batch_size=request.batch_size,
        plugins=registry.third_party(),
    )


def resolve_comparison(
    request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup
) -> list[SearchSettings]:
    """Validate a request to compare: one search for each entry, each with a journal of its own.

    Raises:
        UsageError: the entries cannot be compared.
        SlebError: a subclass that fits, if one of the searches is impossible.
    """
    once = cache(notify)  # every search repeats the notices about the model
    entries = parse_entries(request)
    requests = [_request_for(request, metric, strategy, registry) for metric, strategy in entries]
    if group.is_main:
        # An unfinished comparison was allowed to write the plan, and may have been killed just after it did.
        replaces = request.resume and any(journal_of(each.plan_file).exists() for each in requests)
        require_new_file(request.plan_file, force=request.force or replaces)

    def tell(event: Event) -> None:
        once(event) if isinstance(event, Notice) else notify(event)

    return [resolve_search(each, registry, tell, group) for each in requests]


def _request_for(request: SearchRequest, metric: str, strategy: StrategyName, registry: Registry) -> SearchRequest:
    """Return the request for one search, with `--fast` only where candidates can race; no plan is written for it."""
    name = re.sub(r"[^\w.+@-]", "-", f"{metric}@{strategy}")
    return replace(
        request,
        metric=metric,
        strategy=strategy,
        fast=request.fast if can_race(registry.metric(metric), strategy) else False,
        output=request.plan_file.parent / f"{request.plan_file.name}.{name}",
        compare=(),
    )


def chosen_target(request: SearchRequest) -> TargetName:
    """Return the one field of `TARGET_NAMES` that is given.

    Raises:
        UsageError: none is given, or several are, or a field that belongs to another target.
    """
    given = [name for name in TARGET_NAMES if getattr(request, name) is not None]
    if not given:
        raise UsageError(
            f"No target given: one of {', '.join(map(option_of, TARGET_NAMES))} is needed.",
            hint="For example: --ratio 0.2.",
        )
    if len(given) > 1:
        options = " and ".join(map(option_of, given))
        raise UsageError(f"{options} cannot be combined.", hint="Use one of them.")
    if request.serve_length is not None and given[0] != "target_memory":
        raise UsageError("--serve-length requires --target-memory.", hint="Leave out --serve-length.")
    return given[0]


def can_race(metric: Metric, strategy: StrategyName) -> bool:
    """Whether candidates can be compared sequence by sequence until one wins."""
    return isinstance(metric, LogitMetric) and STRATEGIES[strategy].races


def parse_entries(request: SearchRequest) -> list[tuple[str, StrategyName]]:
    """Read the entries of `--compare`: a metric, and the strategy to search with.

    Raises:
        UsageError: a strategy is unknown, an entry is alone or a duplicate, or the plans would differ in size.
    """
    if request.metric is not None or request.extend is not None:
        given = "--metric" if request.metric is not None else "--extend"
        raise UsageError(
            f"--compare names the metric of each search, so {given} does not apply.", hint=f"Leave out {given}."
        )
    if chosen_target(request) not in ("ratio", "remove", "target_params", "target_memory"):
        raise UsageError(
            "--compare compares metrics at the same size, and a perplexity or a speed-up does not fix the size.",
            hint="Use --remove, --ratio, --target-params or --target-memory.",
        )
    entries = []
    for text in request.compare:
        metric, at, strategy = text.rpartition("@")
        usual = request.strategy or DEFAULT_STRATEGY
        entries.append((metric, strategy_name(strategy)) if at else (text, strategy_name(usual)))
    if len(entries) < 2 or len(set(entries)) < len(entries):
        problem = "names an entry twice" if len(entries) > 1 else "needs at least two entries"
        raise UsageError(
            f"--compare {','.join(request.compare)} {problem}.",
            hint="For example: --compare nll,cosine,angular@contiguous.",
        )
    return entries


def _fill_gaps(request: SearchRequest, extended: Plan | None) -> SearchRequest:
    """Fill unset options from the extended plan, or from the defaults."""
    # What free memory decides stays as it was.
    before = recorded(journal_of(request.plan_file), {"dtype": str, "batch_size": int}) if request.resume else {}
    values: dict[str, Any] = {
        "metric": DEFAULT_METRIC,
        "strategy": DEFAULT_STRATEGY,
        "protect_first": DEFAULT_PROTECTED,
        "protect_last": DEFAULT_PROTECTED,
        "dtype": before.get("dtype") or AUTO,
        "batch_size": before.get("batch_size"),
        "holdout": 0.0,
        "seed": 0,
    }
    if extended is not None:
        search, text = extended.search, extended.calibration
        of_search = {*values, "fast"} - {"seed"}
        values = {name: getattr(search, name) for name in of_search}
        values |= {name: getattr(text, name) for name in ("chat", "seed", "sequence_length")}
        values |= {"calibration": text.source, "protect": search.protect or None}
        if text.source not in REFERENCE_PRESETS:  # their samples count rows of text, not sequences
            values["samples"] = text.sequences
    return replace(request, **{name: value for name, value in values.items() if getattr(request, name) is None})


def _require_coherent(request: SearchRequest, metric: Metric, strategy: StrategyName) -> None:
    """Check that options, the metric and the strategy fit together.

    Raises:
        UsageError: they do not.
    """
    if request.holdout is not None and request.holdout >= 1:
        raise UsageError(
            f"--holdout must be at least 0 and below 1, not {request.holdout:g}.",
            hint="0.2 holds out a fifth of the sequences.",
        )
    if request.fast and not can_race(metric, strategy):
        unfit = f"--strategy {strategy}" if isinstance(metric, LogitMetric) else metric.name
        raise UsageError(
            f"--fast does not apply to {unfit}, which does not compare candidates sequence by sequence.",
            hint="Leave out --fast.",
        )
    if STRATEGIES[strategy].needs_sets and not isinstance(metric, LogitMetric | ModelMetric):
        raise UsageError(
            f"--strategy {strategy} compares sets of blocks, but {metric.name} scores single blocks.",
            hint="Use a metric of the whole model, such as nll, or --strategy greedy.",
        )
    if request.extend is not None and strategy != "greedy":
        raise UsageError(
            f"--extend works with --strategy greedy only, not with {strategy}.",
            hint="Search again for the number of blocks you want.",
        )
    require_one_placement(request)
    if request.device_map is not None and request.target_speedup is not None:
        raise UsageError(
            "--target-speedup times the whole model on one device, but --device-map spreads it out.",
            hint="Use another target, such as --ratio.",
        )


def _require_place(request: SearchRequest) -> None:
    """Check, before any work, that the plan can be written and overwrites nothing.

    Raises:
        OutputError: a plan or an unfinished search exists, or the path is not writable.
    """
    journal = journal_of(request.plan_file)
    # An unfinished search was allowed to write the plan, and may have been killed just after it did.
    replaces = request.plan_file == request.extend or (request.resume and journal.exists())
    require_new_file(request.plan_file, force=request.force or replaces)
    if journal.exists() and not (request.resume or request.force):
        raise OutputError(
            f"{journal} holds an unfinished search.", hint="Continue it with --resume, or start over with --force."
        )


def _read_architecture(
    request: SearchRequest, extended: Plan | None, registry: Registry, notify: Notify
) -> Architecture:
    """Read the model's architecture.

    Raises:
        PlanError: the extended plan was made for another model.
        UnsupportedModelError: the model has too few blocks.
    """
    source = locate_model(request.model, notify, revision=request.revision, trust_remote_code=request.trust_remote_code)
    if extended is not None and request.extend is not None:
        require_same_code(request.extend, extended, source)
    architecture = read_architecture(source, registry, notify)
    if extended is not None and request.extend is not None:
        require_same_model(request.extend, extended, architecture)
    if architecture.block_count < 2:
        raise UnsupportedModelError(
            f"Nothing can be removed from {source.id}, which has {plural(architecture.block_count, 'block')}.",
            hint="Name a model of two blocks or more.",
        )
    return architecture


def _protected(request: SearchRequest, architecture: Architecture) -> tuple[int, ...]:
    """Return the protected blocks, named by number or by kind.

    Raises:
        UsageError: the model has no such block or kind.
    """
    count, kinds = architecture.block_count, architecture.kinds
    absent = [block for block in request.protect or () if not 0 <= block < count]
    if absent:
        raise UsageError(
            f"There is no block {absent[0]} to protect: {architecture.source.id} has {count} blocks, 0 to {count - 1}.",
            hint="Blocks are numbered from 0.",
        )
    known = sorted({part for kind in kinds for part in (kind, *kind.split(", ")) if part})
    unknown = [kind for kind in request.protect_kind if kind not in known]
    if unknown:
        otherwise = None if known else "All its blocks are of one kind: use --protect 5,11."
        raise UsageError(
            f"{architecture.source.id} has no blocks of kind {unknown[0]!r}.",
            hint=did_you_mean(unknown[0], known, otherwise),
        )
    of_kind = [b for b, kind in enumerate(kinds) if {kind, *kind.split(", ")} & set(request.protect_kind)]
    return tuple(sorted({*(request.protect or ()), *of_kind}))


def _require_runnable(request: SearchRequest, metric: Metric, placement: Placement) -> None:
    """Check that a model whose blocks are streamed is not needed whole.

    Raises:
        UsageError: it is, and the user streams it.
        MachineError: it is, and there is too little memory to hold it.
    """
    if not placement.stream:
        return
    error = UsageError if request.stream else MachineError
    if isinstance(metric, ModelMetric):
        raise error(
            f"{metric.name} runs the whole model, but the model is streamed block by block.",
            hint="Use a machine with more memory, or --device-map.",
        )
    if request.target_speedup is not None:
        raise error(
            "--target-speedup times the whole model, but the model is streamed block by block.", hint="Use --ratio."
        )


def parse_target(request: SearchRequest, name: TargetName, architecture: Architecture, notify: Notify) -> Target | None:
    """Return the target, or None for --target-speedup, which must be timed first.

    Raises:
        UsageError: it is not a number.
        UnsupportedModelError: the size of the KV cache is unknown.
    """
    asked = _asked(request, name)
    if name in ("ratio", "remove"):
        blocks = architecture.block_count
        remove = math.ceil(asked * blocks) if name == "ratio" else int(asked)
        count = PerBlock(0, (1,) * blocks)
        return SizeTarget(name, count, max(0, blocks - remove), lambda n: f"{n:g} of {blocks} blocks")
    if name == "target_params":
        sizes = count_parameters(architecture)
        return SizeTarget(name, sizes, float(asked), lambda n: f"{format_count(n)} parameters")
    if name == "target_memory":
        return _memory_target(int(asked), request, architecture, notify)
    return None if name == "target_speedup" else PerplexityTarget(float(asked))


def _asked(request: SearchRequest, name: TargetName) -> Fraction | float:
    """Read the number of a target, before the model is looked for."""
    text = str(getattr(request, name))
    match name:
        case "ratio":
            return parse_ratio(text)
        case "remove":
            return int(text)
        case "target_params":
            return parse_count(text, option_of(name))
        case "target_memory":
            return parse_bytes(text, option_of(name))
    return _number(text, name, least=1.01 if name == "target_speedup" else 1)


def _memory_target(most: int, request: SearchRequest, architecture: Architecture, notify: Notify) -> SizeTarget:
    """Count the weights and the KV cache of one sequence, as served.

    That is in the data type of the search, but never in a wider one than the checkpoint's, which is only how a
    processor computes that lacks its arithmetic.
    """
    own = parse_dtype(AUTO, architecture.dtype)
    served = min(parse_dtype(str(request.dtype), own), own, key=lambda dtype: dtype.itemsize)
    length = choose_length(request.serve_length, architecture, DEFAULT_SERVE_LENGTH, "--serve-length")
    kv_cache = f"a KV cache in {dtype_name(served)} for {length} tokens"
    packed = architecture.is_quantized
    weights = stored_bytes(architecture) if packed else count_parameters(architecture) * served.itemsize
    cache = cache_bytes(architecture, served, length)
    form = "packed as in the checkpoint" if packed else f"in {dtype_name(served)}"
    counted = f"the weights {form} ({format_bytes(weights.without(()))})"
    notify(Notice(f"Memory counts {counted} and {kv_cache} ({format_bytes(cache.without(()))})."))
    return SizeTarget("target_memory", weights + cache, most, format_bytes, kv_cache)


def _number(text: str, name: TargetName, least: float) -> float:
    """Read the number of a target; "1.25x" is 1.25.

    Raises:
        UsageError: the text is not a number, or is below the least that makes sense.
    """
    try:
        number = float(text.lower().removesuffix("x"))
    except ValueError:
        number = math.nan
    if not (least <= number < math.inf):
        raise UsageError(
            f"{option_of(name)} {text} is not a number of {least:g} or more.", hint=f"For example: {least + 0.25:g}."
        )
    return number
