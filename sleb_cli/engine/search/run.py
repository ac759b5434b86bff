"""`sleb search`: from a model to a plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import transformers

from sleb_cli import __version__
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.forward.passes import Passes, prepare_passes
from sleb_cli.engine.forward.skipping import GatedModel
from sleb_cli.engine.measure.environment import environment_record
from sleb_cli.engine.measure.sample_generation import sing
from sleb_cli.engine.search.choices import Choice
from sleb_cli.engine.search.held_out import HeldOut, hold_out, parting
from sleb_cli.engine.search.journal import Journal, journal_of
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.resolve import SearchRequest, Settled, settle, with_target
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.speedup import Stopwatch
from sleb_cli.engine.search.strategies import (
    Problem,
)
from sleb_cli.engine.search.targets import LossTarget, option_of
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
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
from sleb_cli.plan import (
    CanaryRecord,
    DenseRecord,
    Engine,
    ExchangeRecord,
    Plan,
    SearchRecord,
    Step,
    TargetRecord,
)
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import differences
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    ModelError,
    ModelMetric,
    PlanError,
    UnsupportedModelError,
    UsageError,
)


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
        settled = with_target(settled, stopwatch.target(settled.removable.candidates), notify)
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
