"""Check and complete a search request before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from sleb_cli.atomic import require_new_file
from sleb_cli.engine.device import choose_device
from sleb_cli.engine.door.machine import require_one_placement
from sleb_cli.engine.forward.placement import Placement, place_model
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import DEMO, locate_model
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import journal_of, recorded
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.strategies import STRATEGIES, Strategy, free_spans, strategy_name
from sleb_cli.engine.search.targets import SizeTarget, Target, chosen_target, option_of, resolve_target
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import require_same_code, require_same_model
from sleb_cli.engine.text.calibration import (
    REFERENCE_PRESETS,
    CalibrationSettings,
    require_given_text,
    resolve_calibration,
)
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import MetricRecord, Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import is_main_process
from sleb_cli.requests import (
    AUTO,
    DEFAULT_METRIC,
    DEFAULT_PROTECTED,
    DEFAULT_SAMPLE_TOKENS,
    DEFAULT_STRATEGY,
    SearchRequest,
    StrategyName,
)
from sleb_cli.units import parse_bytes, plural
from sleb_plugins import LogitMetric, MachineError, Metric, ModelMetric, OutputError, UnsupportedModelError, UsageError
from sleb_plugins.errors import did_you_mean


@dataclass(frozen=True)
class ResolvedSearch:
    """A search after every check that needs no weights; `request` has every option set that has a default."""

    request: SearchRequest
    extended: Plan | None
    architecture: Architecture
    metric: Metric
    implementation: MetricRecord
    strategy_name: StrategyName
    calibration: CalibrationSettings
    placement: Placement
    removable: Removable
    plugins: Mapping[str, str]
    """The versions of other packages that offer plugins."""
    target: Target | None
    """How far to search; None for --target-speedup until the model is timed."""
    remove: int = 0
    """The largest possible number of removals."""

    @property
    def gone(self) -> tuple[int, ...]:
        """The blocks that the extended plan removes."""
        return self.extended.removals if self.extended else ()

    @property
    def strategy(self) -> Strategy:
        """The search strategy."""
        return STRATEGIES[self.strategy_name]

    @property
    def sample_tokens(self) -> int:
        """How many tokens both models generate at the end."""
        usual = 0 if self.placement.stream else DEFAULT_SAMPLE_TOKENS  # each token would read the whole model
        return usual if self.request.sample_tokens is None else self.request.sample_tokens


def resolve_search(request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup) -> ResolvedSearch:
    """Check everything that needs no weights, in each process; all place the model as the main one does.

    Raises:
        SlebError: a subclass that fits, if the request is impossible.
    """
    resolved = group.one_first(lambda: _resolve(request, registry, notify))
    placement = group.from_main(lambda: resolved.placement)
    return replace(resolved, placement=replace(placement, device=resolved.placement.device))


def _resolve(request: SearchRequest, registry: Registry, notify: Notify) -> ResolvedSearch:
    """Check the request alone first."""
    quiet_libraries()
    chosen_target(request)
    extended = read_plan(request.extend) if request.extend is not None else None
    request = _fill_gaps(request, extended)
    metric, strategy = registry.metric(str(request.metric)), strategy_name(str(request.strategy))
    if request.fast is None:
        # The demo is a first impression: it must not take long.
        request = replace(request, fast=request.model == DEMO and can_race(metric, strategy))
    _require_fitting(request, metric, strategy)
    if is_main_process():
        _require_place(request)
    choose_device(request.device)  # a device that is not there is reported before the model is looked for
    architecture = _read_architecture(request, extended, registry, notify)
    protection = Protection(request.protect_first or 0, request.protect_last or 0, _protected(request, architecture))
    placement = _place(request, metric, architecture, notify)
    # A template's tokens cost most of the loss, and the model never writes them.
    calibration = replace(_resolve_text(request, architecture), own_answers=True)
    if placement.stream:
        require_given_text(calibration)
    target = resolve_target(request, architecture, str(request.dtype), notify)
    resolved = ResolvedSearch(
        request=request,
        extended=extended,
        architecture=architecture,
        metric=metric,
        implementation=registry.metric_record(metric),
        strategy_name=strategy,
        calibration=calibration,
        placement=placement,
        removable=Removable(architecture, protection, notify),
        plugins=registry.third_party(),
        target=target,
    )
    resolved = with_target(resolved, target, notify) if target is not None else resolved
    resolved.removable.candidates(resolved.gone)  # raises now if no block can be removed
    return resolved


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


def with_target(resolved: ResolvedSearch, target: Target, notify: Notify) -> ResolvedSearch:
    """Set the target and the largest number of removals for it.

    Raises:
        UsageError: the target is already met, cannot be met, or does not fit the strategy.
    """
    blocks, gone = resolved.architecture.block_count, resolved.gone
    candidates = resolved.removable.protection.candidates(blocks, ())
    if isinstance(target, SizeTarget):
        if resolved.strategy_name == "refine" and len(set(target.sizes.blocks)) > 1:
            raise UsageError(
                f"--strategy refine swaps blocks, and those of this model differ in size, so it may miss "
                f"{option_of(target.name)}.",
                hint="Use --strategy greedy, or --remove.",
            )
        remove = target.removals(candidates, gone)
        if resolved.strategy_name == "contiguous":
            free_spans(resolved.removable.candidates, remove)
        return replace(resolved, target=target, remove=remove)
    if resolved.strategy_name == "contiguous":
        candidates = longest_run(resolved.removable.candidates(()))
    most = min(len({*candidates, *gone}), blocks - 1)
    limit = f"{target.limit:g}x the dense model's"
    notify(Notice(f"The search removes up to {most} blocks, and stops before perplexity is over {limit}."))
    return replace(resolved, target=target, remove=most)


def longest_run(blocks: Sequence[int]) -> list[int]:
    """Return the longest run of consecutive blocks; the first one if several are equally long."""
    # As long as blocks are consecutive, they are as far ahead of their place in the list.
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    return max(runs, key=len, default=[])


def _place(request: SearchRequest, metric: Metric, architecture: Architecture, notify: Notify) -> Placement:
    """Choose where the weights are, and in which form.

    Raises:
        UsageError: options contradict each other, or the metric needs more than one block at a time.
        MachineError: the model is streamed because there is too little memory, and the metric needs more.
    """
    device, dtype = choose_device(request.device), str(request.dtype)
    placement = place_model(architecture, device, dtype, notify, device_map=request.device_map, stream=request.stream)
    if not placement.stream:
        return placement
    error, hint = UsageError if request.stream else MachineError, "Use a machine with more memory, or --device-map."
    if isinstance(metric, ModelMetric):
        raise error(f"{metric.name} runs the whole model, but the model is streamed block by block.", hint=hint)
    if request.target_speedup is not None:
        words = "--target-speedup times the whole model, but the model is streamed block by block."
        raise error(words, hint="Use --ratio.")
    return placement


def _resolve_text(request: SearchRequest, architecture: Architecture) -> CalibrationSettings:
    return resolve_calibration(
        architecture, request.calibration, request.samples, request.sequence_length, request.seed, request.chat
    )


def can_race(metric: Metric, strategy: StrategyName) -> bool:
    """Whether candidates can be compared sequence by sequence until one wins."""
    return isinstance(metric, LogitMetric) and STRATEGIES[strategy].races


def _require_fitting(request: SearchRequest, metric: Metric, strategy: StrategyName) -> None:
    """Check that options are in range, and that they, the metric and the strategy fit together.

    Raises:
        UsageError: they do not.
    """
    if request.memory is not None:
        parse_bytes(str(request.memory), "--memory")
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
    unknown = [kind for kind in request.protect_kinds if kind not in known]
    if unknown:
        raise UsageError(
            f"{architecture.source.id} has no blocks of kind {unknown[0]!r}.",
            hint=did_you_mean(
                unknown[0], known, None if known else "All its blocks are of one kind: use --protect 5,11."
            ),
        )
    of_kind = [b for b, kind in enumerate(kinds) if {kind, *kind.split(", ")} & set(request.protect_kinds)]
    return tuple(sorted({*(request.protect or ()), *of_kind}))


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
        of_search = {*values, "fast", "protect"} - {"seed"}
        values = {name: getattr(search, name) for name in of_search}
        values |= {name: getattr(text, name) for name in ("chat", "seed", "sequence_length")}
        values["calibration"] = text.source
        if text.source not in REFERENCE_PRESETS:  # their samples count rows of text, not sequences
            values["samples"] = text.sequences
    return replace(request, **{name: value for name, value in values.items() if getattr(request, name) is None})
