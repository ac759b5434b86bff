"""`sleb search`: from a model to a plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from sleb_cli import __version__
from sleb_cli.engine.architecture import Architecture, read_architecture
from sleb_cli.engine.calibration import (
    REFERENCE_PRESETS,
    Calibration,
    CalibrationRequest,
    CalibrationSettings,
    calibrate,
    settle_calibration,
)
from sleb_cli.engine.canary import sing
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.gates import GatedModel
from sleb_cli.engine.loading import (
    choose_device,
    choose_dtype,
    dtype_name,
    load_dense,
    load_tokenizer,
    quiet_libraries,
)
from sleb_cli.engine.search.aiming import Aim, Stopwatch
from sleb_cli.engine.search.budget import parse_bytes
from sleb_cli.engine.search.greedy import Choice, Protection
from sleb_cli.engine.search.held_out import HeldOut, hold_out, parting
from sleb_cli.engine.search.passes import Passes, prepare_passes
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import (
    DEFAULT_BEAM_WIDTH,
    STRATEGIES,
    Problem,
    Strategy,
    free_spans,
    strategy_name,
)
from sleb_cli.engine.search.targets import LossTarget, SizeTarget, Target, TargetRequest, longest_run, option_of
from sleb_cli.engine.source import locate_model
from sleb_cli.engine.subject import require_same_model
from sleb_cli.events import (
    BlockRemoved,
    BlocksExchanged,
    Notice,
    Notify,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
)
from sleb_cli.journal import Journal, journal_of
from sleb_cli.plan import (
    CanaryRecord,
    DenseRecord,
    Engine,
    ExchangeRecord,
    Plan,
    SearchRecord,
    Step,
    StrategyName,
    TargetRecord,
    read_plan,
)
from sleb_cli.plugin_manager import Registry, suggestion
from sleb_cli.records import differences
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelError,
    ModelMetric,
    PlanError,
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
class Settled:
    """A request after everything that can be checked without the weights was checked."""

    request: SearchRequest
    extended: Plan | None
    architecture: Architecture
    metric: Metric
    strategy_name: StrategyName
    calibration: CalibrationSettings
    aim: Aim
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


class Shared:
    """What searches of one model on one text share; the first one loads it."""

    def __init__(self) -> None:
        self._loaded: tuple[Any, Callable[[], Any], Calibration] | None = None

    def load(self, settled: Settled, notify: Notify) -> tuple[Any, Callable[[], Any], Calibration]:
        """Give tokenizer, model and calibration sequences."""
        if self._loaded is None:
            tokenizer = load_tokenizer(settled.architecture.source)
            # Loaded at first use: a text that is missing should be said before gigabytes are read.
            model = cache(partial(load_dense, settled.architecture, settled.aim.dtype, settled.aim.device, notify))
            self._loaded = tokenizer, model, calibrate(settled.calibration, tokenizer, model, notify)
        return self._loaded


def plan_removals(request: SearchRequest, registry: Registry, notify: Notify) -> Plan:
    """Search for the blocks that the model can best do without.

    What is measured on the way stands in a journal beside `request.output`; whoever writes the plan deletes it then.

    Raises:
        SlebError: of the class that fits, for anything the request asks that cannot be.
    """
    return carry_out(settle(request, registry, notify), Shared(), registry, notify)


def carry_out(settled: Settled, shared: Shared, registry: Registry, notify: Notify) -> Plan:
    """Do a search that was settled, with what it shares with others of the same model on the same text.

    Raises:
        SlebError: of the class that fits, for what only shows when the model and the text are read.
    """
    started, request = time.monotonic(), settled.request
    tokenizer, model, calibration = shared.load(settled, notify)
    _require_continuation(settled, calibration)
    journal = Journal(journal_of(request.output))
    stopwatch = Stopwatch(settled.aim, model, request.target)
    if settled.target is None:
        settled = _with_target(settled, stopwatch.target(settled.removable.candidates), notify)
    try:
        dense, course, how = _search(settled, model(), tokenizer, calibration, journal, notify)
        target = _record(settled, dense, course, stopwatch)
        how = how.model_copy(update={"remove": len(course.removals), "target": target})
    except BaseException:
        if len(journal):
            notify(Notice(f"What was measured is kept in {journal.path}: the same command with --resume goes on."))
        raise
    finally:
        journal.close()
    return Plan(
        schema_version=1,
        sleb_version=__version__,
        model=settled.architecture.record,
        calibration=calibration.record,
        search=how,
        dense=dense,
        removals=course.removals,
        steps=tuple(course.steps),
        canary=course.canary,
        environment=environment_record(registry.third_party(), settled.aim.device, time.monotonic() - started),
    )


def settle(request: SearchRequest, registry: Registry, notify: Notify) -> Settled:
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
    dtype = choose_dtype(request.dtype or "auto", architecture, device)
    aim = Aim(architecture, protection, dtype, device, notify)
    target = aim.target(request.target)
    removable = Removable(architecture, protection, notify)
    settled = Settled(
        request=request,
        extended=extended,
        architecture=architecture,
        metric=metric,
        strategy_name=strategy,
        calibration=settle_calibration(request.calibration, architecture),
        aim=aim,
        removable=removable,
        target=target,
    )
    settled = _with_target(settled, target, notify) if target is not None else settled
    removable.candidates(settled.gone)  # whether any can go is said before any work
    if strategy == "contiguous":
        free_spans(removable.candidates, settled.remove or 1)
    return settled


def _with_target(settled: Settled, target: Target, notify: Notify) -> Settled:
    """Say how many removals a target can take.

    Raises:
        UsageError: it is met already, cannot be met, or does not fit the strategy.
    """
    if isinstance(target, SizeTarget) and target.counts_blocks and settled.gone and target.met(settled.gone):
        asked = len(target.sizes.blocks) - int(target.most)
        raise UsageError(
            f"{settled.request.extend} has {len(settled.gone)} removals already, and {asked} are asked for.",
            hint="Ask for more; where fewer will do, `sleb apply --remove N` takes the first N.",
        )
    candidates = settled.aim.protection.candidates(settled.architecture.block_count, ())
    if settled.strategy_name == "refine" and isinstance(target, SizeTarget) and not target.blocks_are_alike:
        raise UsageError(
            f"--strategy refine exchanges blocks, which are not all of one size here: {option_of(target.name)} may be "
            f"missed.",
            hint="Take --strategy greedy, or --remove.",
        )
    if settled.strategy_name == "contiguous" and isinstance(target, LossTarget):
        candidates = longest_run(candidates)
    most = min(target.removals(candidates, settled.gone), settled.architecture.block_count - 1)
    if isinstance(target, LossTarget):
        within = f"The search goes on while the loss is within {target.most:.4f} nats per token of the dense model's"
        notify(Notice(f"{within}, for up to {most} removals."))
    return replace(settled, target=target, remove=most)


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


def _require_continuation(settled: Settled, calibration: Calibration) -> None:
    """Make sure that the extended plan was searched on the same tokens, in the same way.

    Raises:
        PlanError: it was not; the sentence names the differences.
    """
    plan, request = settled.extended, settled.request
    if plan is None:
        return
    names = ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout")
    found: dict[str, Any] = {name: getattr(request, name) for name in names}
    found |= {"dtype": dtype_name(settled.aim.dtype), "protect": settled.aim.protection.blocks}
    expected = {name: getattr(plan.search, name) for name in found}
    differing = differences(
        {"search": found, "calibration": calibration.record.to_data()},
        {"search": expected, "calibration": plan.calibration.to_data()},
    )
    if differing:
        raise PlanError(
            f"This search does not go on where {request.extend} ended ({differing}).",
            hint="Leave these settings to the plan, and name the text that it was calibrated on.",
        )


def _search(
    settled: Settled, model: Any, tokenizer: Any, calibration: Calibration, journal: Journal, notify: Notify
) -> tuple[DenseRecord, _Course, SearchRecord]:
    architecture, request, metric = settled.architecture, settled.request, settled.metric
    searched, kept = hold_out(calibration.to(settled.aim.device), request.holdout or 0)
    if request.fast:
        searched = searched.shuffled()
    with GatedModel(model, architecture.blocks_of(model)) as gated:
        passes, reason = _prepare(gated, settled, searched, notify)
        held_out = passes.beside(kept.sequences, kept.counted) if kept else None
        scoring = Scoring(
            passes, journal, tokenizer, notify, fast=request.fast, winners=settled.beam_width, held_out=held_out
        )
        _, engine = scoring.scorer(metric)
        how = _how(settled, scoring, engine, reason)
        journal.of_sets = isinstance(metric, LogitMetric | ModelMetric)
        journal.open(_identity(settled, calibration, how), resume=request.resume)
        if len(journal):
            notify(Notice(f"{journal.path} holds {len(journal)} measurements: the search goes on from there."))
        dense = settled.extended.dense if settled.extended else _measure_dense(scoring, settled)
        course = _follow(settled, dense, scoring, notify)
        if words := parting(course.steps):
            notify(Notice(words))
        course.canary = sing(gated, tokenizer, course.removals, architecture.longest_sequence, notify)
    return dense, course, how


def _prepare(
    gated: GatedModel, settled: Settled, calibration: Calibration, notify: Notify
) -> tuple[Passes, str | None]:
    request = settled.request
    notify(TaskStarted(task := "Checking the engine"))
    prepared = prepare_passes(
        gated,
        calibration.sequences,
        notify,
        counted=calibration.counted,
        memory=request.memory,
        batch_size=request.batch_size,
        looks=LOOKS if request.fast else 1,
    )
    notify(TaskFinished(task))
    return prepared


def _how(settled: Settled, scoring: Scoring, engine: Engine, reason: str | None) -> SearchRecord:
    request, metric = settled.request, settled.metric
    return SearchRecord(
        strategy=settled.strategy_name,
        beam_width=settled.beam_width if settled.strategy_name == "beam" else None,
        metric=metric.name,
        remove=settled.remove,
        ratio=request.target.ratio,
        protect_first=settled.aim.protection.first,
        protect_last=settled.aim.protection.last,
        protect=settled.aim.protection.blocks,
        dtype=dtype_name(settled.aim.dtype),
        device=settled.aim.device.type,
        batch_size=scoring.passes.budget.sequences,
        fast=request.fast,
        holdout=request.holdout or 0.0,
        held_out=sum(map(len, scoring.held_out.batches)) if scoring.held_out else 0,
        engine=engine,
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


@dataclass
class _Course:
    """How a search went: its steps, what is gone in the end, and what the removal that was not made would have cost.

    `next_increase` is in nats per token above the dense model; None where none was tried that the target did not allow.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    next_increase: float | None = None
    canary: CanaryRecord | None = None


def _follow(settled: Settled, dense: DenseRecord, scoring: Scoring, notify: Notify) -> _Course:
    """Search until the target is met, or the next removal would miss it.

    Raises:
        UsageError: not even one removal is within the target.
    """
    if settled.strategy_name == "refine" and isinstance(settled.target, LossTarget):
        # It exchanges at its last size, which a greedy search tells; and what that measured is known from then on.
        greedily = _follow(replace(settled, strategy_name="greedy"), dense, scoring, notify)
        refined = _take_steps(replace(settled, remove=len(greedily.removals)), dense, scoring, notify)
        return replace(refined, next_increase=greedily.next_increase)
    course = _take_steps(settled, dense, scoring, notify)
    if len(course.removals) == len(settled.gone):
        assert isinstance(settled.target, LossTarget)
        assert course.next_increase is not None
        raise UsageError(
            f"The {'next' if settled.gone else 'first'} removal would put the loss {course.next_increase:.4f} nats per "
            f"token above the dense model's, and {settled.target.most:.4f} are allowed.",
            hint=f"Allow more: a larger {option_of(settled.target.name)}. With --resume, nothing is measured again.",
        )
    return course


def _take_steps(settled: Settled, dense: DenseRecord, scoring: Scoring, notify: Notify) -> _Course:
    metric, target = settled.metric, settled.target
    course = _Course(list(settled.extended.steps) if settled.extended else [], settled.gone)
    assert target is not None
    compared = _comparison(settled, scoring)
    notify(
        SearchStarted(
            settled.architecture.block_count, settled.remove, len(course.steps), _evaluations(settled, scoring)
        )
    )
    problem = Problem(
        scoring.scorer(metric)[0],
        settled.removable.candidates,
        settled.remove,
        removed=settled.gone,
        score_spans=scoring.span_scorer(metric, settled.remove),
        width=settled.beam_width,
        exchanged=lambda e: notify(BlocksExchanged(e.restored, e.removed, e.before, e.after)),
    )
    for choice in _choices(settled, problem, notify):
        loss = scoring.loss(choice.removals, scores_are_losses=metric.name == "nll")
        if not target.allows(loss - dense.loss):
            course.next_increase = loss - dense.loss
            break
        step = _step(choice, course.removals, loss, settled.architecture.kinds)
        if compared:
            there = compared.compare(choice.removals, partial(_perplexity, block=choice.block))
            step = step.model_copy(update={"held_out": there})
        course.steps.append(step)
        course.removals = choice.removals
        scoring.journal.sync()
        notify(BlockRemoved(len(course.steps), step.block, step.score, step.perplexity, step.removals))
        if target.met(course.removals):
            break
    notify(TaskFinished("Search"))
    return course


def _choices(settled: Settled, problem: Problem, notify: Notify) -> Iterator[Choice]:
    """Give one size after another. Where no number of removals is asked for, it is no error that no more may go."""
    choices = settled.strategy.search(problem)
    if not isinstance(settled.target, LossTarget):
        yield from choices
        return
    try:
        yield from choices
    except UnsupportedModelError as error:
        notify(Notice(f"The search ends here: {error.message}"))


def _record(settled: Settled, dense: DenseRecord, course: _Course, stopwatch: Stopwatch) -> TargetRecord | None:
    """Say what was to be reached, and what was; a speedup is timed once more, on the blocks that were found."""
    request, target = settled.request.target, settled.target
    assert target is not None
    if isinstance(target, LossTarget):
        increase = math.log(course.steps[-1].perplexity) - dense.loss
        return target.record(increase, course.next_increase)
    if target.counts_blocks:
        return None
    if target.name == "target_speedup":
        return stopwatch.record(target, course.removals)
    serving = settled.aim.serving(request) if target.name == "target_memory" else None
    return target.record(course.removals, serving)


def _step(choice: Choice, before: tuple[int, ...], loss: float, kinds: Sequence[str]) -> Step:
    """Write a choice down, after the blocks that were gone at the size before."""
    return Step(
        block=choice.block,
        kind=kinds[choice.block],
        score=choice.score,
        perplexity=_perplexity(loss, choice.block),
        scores=dict(choice.outcome.scores),
        race=choice.outcome.race,
        removals=None if choice.removals == (*before, choice.block) else choice.removals,
        exchanges=tuple(ExchangeRecord(**vars(exchange)) for exchange in choice.exchanges),
    )


def _identity(settled: Settled, calibration: Calibration, how: SearchRecord) -> dict[str, Any]:
    """Say what a journal's measurements depend on; how many blocks go in the end is not among it."""
    return {
        "sleb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": settled.architecture.record.model_dump(mode="json", exclude={"id", "revision"}),
        "calibration": calibration.record.to_data(),
        "search": how.model_dump(mode="json", exclude={"remove", "ratio", "target"}),
    }


def _measure_dense(scoring: Scoring, settled: Settled) -> DenseRecord:
    scoring.notify(TaskStarted(task := "Measuring the dense model", scoring.sequences, "sequences"))
    loss = scoring.loss((), advanced=lambda done: scoring.notify(TaskAdvanced(task, done)))
    scoring.notify(TaskFinished(task))
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of {settled.architecture.source.id} itself is {loss} in {dtype_name(settled.aim.dtype)}.",
            hint="Use a wider data type: --dtype float32.",
        )
    compared = _comparison(settled, scoring)
    return DenseRecord(loss=loss, perplexity=math.exp(loss), held_out=compared.dense() if compared else None)


def _comparison(settled: Settled, scoring: Scoring) -> HeldOut | None:
    """Choose how the sequences that are held out are compared with the others; None where there are none."""
    losses = partial(scoring.losses, scores_are_losses=settled.metric.name == "nll")
    return HeldOut(losses, scoring.held_out_losses, settled.remove) if scoring.held_out else None


def _evaluations(settled: Settled, scoring: Scoring) -> tuple[int, ...]:
    removed = settled.extended.removals if settled.extended else ()
    candidates = len(settled.removable.candidates(removed))
    sets = settled.strategy.evaluations(candidates, settled.remove - len(removed), settled.beam_width)
    return tuple(count * scoring.sequences for count in sets)


def _perplexity(loss: float, block: int) -> float:
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise ModelError(
            f"Without block {block}, the calibration loss is {loss} nats per token: no perplexity can be given.",
            hint="A wider data type may help: --dtype float32.",
        )
    return perplexity
