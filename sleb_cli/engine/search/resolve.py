"""What a search was asked for, checked and completed, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleb_cli.engine.device import choose_device, choose_dtype
from sleb_cli.engine.forward.memory_budget import parse_bytes
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.context import SearchContext
from sleb_cli.engine.search.journal import Journal, journal_of
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.strategies import (
    DEFAULT_BEAM_WIDTH,
    STRATEGIES,
    Strategy,
    free_spans,
    strategy_name,
)
from sleb_cli.engine.search.targets import LossTarget, SizeTarget, Target, TargetRequest, longest_run, option_of
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import require_same_model
from sleb_cli.engine.text.calibration import (
    REFERENCE_PRESETS,
    CalibrationRequest,
    CalibrationSettings,
    resolve_calibration,
)
from sleb_cli.events import (
    Notice,
    Notify,
)
from sleb_cli.plan import (
    Plan,
    StrategyName,
    read_plan,
)
from sleb_cli.plugin_manager import Registry, suggestion
from sleb_plugins import (
    LogitMetric,
    Metric,
    ModelMetric,
    UnsupportedModelError,
    UsageError,
)


@dataclass(frozen=True)
class SearchRequest:
    """Everything that decides a search, as the user gave it; None leaves it to the plan that is extended, or to us."""

    model: str
    output: Path
    target: TargetRequest
    calibration: CalibrationRequest
    metric: str | None = None
    strategy: str | None = None
    beam_width: int | None = None
    fast: bool = False
    holdout: float | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    protect: tuple[int, ...] | None = None
    protect_kinds: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "auto"
    memory: str | None = None
    batch_size: int | None = None
    extend: Path | None = None
    resume: bool = False
    force: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ResolvedSearch:
    """A request after everything that can be checked without the weights was checked."""

    request: SearchRequest
    extended: Plan | None
    architecture: Architecture
    metric: Metric
    strategy_name: StrategyName
    calibration: CalibrationSettings
    context: SearchContext
    removable: Removable
    target: Target | None
    """How far it goes; None before it was timed how fast the model is."""
    remove: int = 0
    """The most removals that it can take."""

    @property
    def gone(self) -> tuple[int, ...]:
        """What the extended plan has removed already."""
        return self.extended.removals if self.extended else ()

    @property
    def strategy(self) -> Strategy:
        """How it is searched."""
        return STRATEGIES[self.strategy_name]

    @property
    def beam_width(self) -> int:
        """How many sets are kept from size to size."""
        if self.strategy_name != "beam":
            return 1
        return DEFAULT_BEAM_WIDTH if self.request.beam_width is None else self.request.beam_width


def resolve_search(request: SearchRequest, registry: Registry, notify: Notify) -> ResolvedSearch:
    """Check everything that can be checked without reading the weights.

    Raises:
        SlebError: of the class that fits, for anything the request asks that cannot be.
    """
    quiet_libraries()
    Journal(journal_of(request.output)).require(resume=request.resume, force=request.force)
    request.target.chosen()
    if request.batch_size is not None and request.batch_size < 1:
        raise UsageError(f"--batch-size {request.batch_size} is too small.", hint="Take 1 or more.")
    if request.memory is not None:
        parse_bytes(request.memory)
    if request.holdout is not None and not 0 <= request.holdout < 1:
        raise UsageError(f"--holdout {request.holdout:g} is no share.", hint="0.2 holds out a fifth of the sequences.")
    extended = read_plan(request.extend) if request.extend is not None else None
    request = _fill_gaps(request, extended)
    metric = registry.metric(request.metric or "nll")
    strategy = strategy_name(request.strategy or "greedy")
    _require_fitting(request, metric, strategy)
    device = choose_device(request.device)
    source = locate_model(request.model, notify, revision=request.revision, trust_remote_code=request.trust_remote_code)
    architecture = read_architecture(source, registry, notify)
    if extended is not None and request.extend is not None:
        require_same_model(request.extend, extended, architecture)
    if architecture.block_count < 2:
        raise UnsupportedModelError(
            f"The number of blocks of {source.id} is {architecture.block_count}: nothing can be removed.",
            hint="Name a deeper model.",
        )
    protection = Protection(request.protect_first or 0, request.protect_last or 0, _protected(request, architecture))
    dtype = choose_dtype(request.dtype or "auto", architecture.config.dtype, device)
    context = SearchContext(architecture, protection, dtype, device, notify)
    target = context.target(request.target)
    removable = Removable(architecture, protection, notify)
    resolved = ResolvedSearch(
        request=request,
        extended=extended,
        architecture=architecture,
        metric=metric,
        strategy_name=strategy,
        calibration=resolve_calibration(request.calibration, architecture),
        context=context,
        removable=removable,
        target=target,
    )
    resolved = with_target(resolved, target, notify) if target is not None else resolved
    removable.candidates(resolved.gone)  # whether any can go is said before any work
    if strategy == "contiguous":
        free_spans(removable.candidates, resolved.remove or 1)
    return resolved


def with_target(resolved: ResolvedSearch, target: Target, notify: Notify) -> ResolvedSearch:
    """Say how many removals a target can take.

    Raises:
        UsageError: it is met already, cannot be met, or does not fit the strategy.
    """
    if isinstance(target, SizeTarget) and target.counts_blocks and resolved.gone and target.met(resolved.gone):
        asked = len(target.sizes.blocks) - int(target.most)
        raise UsageError(
            f"{resolved.request.extend} has {len(resolved.gone)} removals already, and {asked} are asked for.",
            hint="Ask for more; where fewer will do, `sleb apply --remove N` takes the first N.",
        )
    candidates = resolved.context.protection.candidates(resolved.architecture.block_count, ())
    if resolved.strategy_name == "refine" and isinstance(target, SizeTarget) and not target.blocks_are_alike:
        raise UsageError(
            f"--strategy refine exchanges blocks, which are not all of one size here: {option_of(target.name)} may be "
            f"missed.",
            hint="Take --strategy greedy, or --remove.",
        )
    if resolved.strategy_name == "contiguous" and isinstance(target, LossTarget):
        candidates = longest_run(candidates)
    most = min(target.removals(candidates, resolved.gone), resolved.architecture.block_count - 1)
    if isinstance(target, LossTarget):
        within = f"The search goes on while the loss is within {target.most:.4f} nats per token of the dense model's"
        notify(Notice(f"{within}, for up to {most} removals."))
    return replace(resolved, target=target, remove=most)


def _require_fitting(request: SearchRequest, metric: Metric, strategy: StrategyName) -> None:
    """Make sure that metric, strategy and their options go together."""
    if request.fast and not isinstance(metric, LogitMetric):
        raise UsageError(
            f"{metric.name} does not score sequence by sequence, so its candidates cannot race.",
            hint="Leave out --fast.",
        )
    if request.fast and not STRATEGIES[strategy].races:
        raise UsageError(
            f"With --strategy {strategy}, it is not one candidate that wins, so they cannot race.",
            hint="Leave out --fast.",
        )
    if STRATEGIES[strategy].needs_sets and not isinstance(metric, LogitMetric | ModelMetric):
        raise UsageError(
            f"--strategy {strategy} compares whole sets of blocks, and {metric.name} looks at single ones.",
            hint="Take a metric of the whole model, such as nll, or --strategy greedy.",
        )
    if request.beam_width is not None and (strategy != "beam" or request.beam_width < 1):
        raise UsageError(
            f"--beam-width {request.beam_width} does not go with --strategy {strategy}."
            if strategy != "beam"
            else f"--beam-width {request.beam_width} is too small.",
            hint="Leave it out." if strategy != "beam" else "Take 1 or more.",
        )
    if request.extend is not None and strategy != "greedy":
        raise UsageError(
            f"--extend goes on with --strategy greedy only, and not with {strategy}.",
            hint="Search again for the number that you want.",
        )


def _protected(request: SearchRequest, architecture: Architecture) -> tuple[int, ...]:
    """Give the blocks that were named, by number or by kind."""
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
            f"{architecture.source.id} has no blocks of the kind {unknown[0]!r}.",
            hint=suggestion(
                unknown[0], known, None if known else "Its blocks are all of one kind: use --protect 5,11."
            ),
        )
    of_kind = [b for b, kind in enumerate(kinds) if {kind, *kind.split(", ")} & set(request.protect_kinds)]
    return tuple(sorted({*(request.protect or ()), *of_kind}))


def _fill_gaps(request: SearchRequest, extended: Plan | None) -> SearchRequest:
    """Take what the user left open from the plan that is extended, or else what is usual."""
    usual: dict[str, Any] = {
        "metric": "nll",
        "strategy": "greedy",
        "protect_first": 1,
        "protect_last": 1,
        "dtype": "auto",
        "holdout": 0.0,
    }
    calibration = request.calibration
    if extended is not None:
        how, was = extended.search, extended.calibration
        usual = {name: getattr(how, name) for name in (*usual, "batch_size", "fast", "protect")}
        drawn = {
            "source": was.source,
            "samples": was.sequences,
            "sequence_length": was.sequence_length,
            "chat": was.chat,
        }
        if was.source in REFERENCE_PRESETS:
            del drawn["samples"]  # those count rows of text, not sequences
        calibration = _fill(calibration, drawn | {"seed": was.seed})
    filled: SearchRequest = replace(_fill(request, usual), calibration=_fill(calibration, {"seed": 0}))
    return filled


def _fill(request: Any, values: Mapping[str, Any]) -> Any:
    """Set those fields of a request that the user left open: 0 is an answer, a flag that is not set is none."""
    left_open = [name for name in values if getattr(request, name) is None or getattr(request, name) is False]
    return replace(request, **{name: values[name] for name in left_open})
