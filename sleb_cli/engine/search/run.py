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
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.measure.environment import environment_record
from sleb_cli.engine.measure.sample_generation import generate_sample
from sleb_cli.engine.search.choices import Choice
from sleb_cli.engine.search.held_out import HeldOut, hold_out, overfitting_note
from sleb_cli.engine.search.journal import Journal, journal_of
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.resolve import ResolvedSearch, SearchRequest, resolve_search, with_target
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.speedup import SpeedupTimer
from sleb_cli.engine.search.strategies import (
    Problem,
)
from sleb_cli.engine.search.targets import LossTarget, option_of
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.events import (
    BlockRemoved,
    BlocksSwapped,
    Notice,
    Notify,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
)
from sleb_cli.plan import (
    DenseRecord,
    Engine,
    Plan,
    SampleGeneration,
    SearchRecord,
    Step,
    SwapRecord,
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

    def load(self, resolved: ResolvedSearch, notify: Notify) -> tuple[Any, Callable[[], Any], Calibration]:
        """Give tokenizer, model and calibration sequences."""
        if self._loaded is None:
            tokenizer = load_tokenizer(resolved.architecture.source)
            # Loaded at first use: a text that is missing should be said before gigabytes are read.
            model = cache(
                partial(load_dense, resolved.architecture, resolved.context.dtype, resolved.context.device, notify)
            )
            self._loaded = tokenizer, model, calibrate(resolved.calibration, tokenizer, model, notify)
        return self._loaded


def find_removals(request: SearchRequest, registry: Registry, notify: Notify) -> Plan:
    """Search for the blocks that the model can best do without.

    What is measured on the way stands in a journal beside `request.output`; whoever writes the plan deletes it then.

    Raises:
        SlebError: of the class that fits, for anything the request asks that cannot be.
    """
    return run_search(resolve_search(request, registry, notify), Shared(), registry, notify)


def run_search(resolved: ResolvedSearch, shared: Shared, registry: Registry, notify: Notify) -> Plan:
    """Do a search that was settled, with what it shares with others of the same model on the same text.

    Raises:
        SlebError: of the class that fits, for what only shows when the model and the text are read.
    """
    started, request = time.monotonic(), resolved.request
    tokenizer, model, calibration = shared.load(resolved, notify)
    _require_continuation(resolved, calibration)
    journal = Journal(journal_of(request.output))
    speedup_timer = SpeedupTimer(resolved.context, model, request.target)
    if resolved.target is None:
        resolved = with_target(resolved, speedup_timer.target(resolved.removable.candidates), notify)
    try:
        dense, trace, how = _search(resolved, model(), tokenizer, calibration, journal, notify)
        target = _record(resolved, dense, trace, speedup_timer)
        how = how.model_copy(update={"remove": len(trace.removals), "target": target})
    except BaseException:
        if len(journal):
            notify(Notice(f"What was measured is kept in {journal.path}: the same command with --resume goes on."))
        raise
    finally:
        journal.close()
    return Plan(
        schema_version=1,
        sleb_version=__version__,
        model=resolved.architecture.record,
        calibration=calibration.record,
        search=how,
        dense=dense,
        removals=trace.removals,
        steps=tuple(trace.steps),
        sample_generation=trace.sample_generation,
        environment=environment_record(registry.third_party(), resolved.context.device, time.monotonic() - started),
    )


def _require_continuation(resolved: ResolvedSearch, calibration: Calibration) -> None:
    """Make sure that the extended plan was searched on the same tokens, in the same way.

    Raises:
        PlanError: it was not; the sentence names the differences.
    """
    plan, request = resolved.extended, resolved.request
    if plan is None:
        return
    names = ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout")
    found: dict[str, Any] = {name: getattr(request, name) for name in names}
    found |= {"dtype": dtype_name(resolved.context.dtype), "protect": resolved.context.protection.blocks}
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
    resolved: ResolvedSearch, model: Any, tokenizer: Any, calibration: Calibration, journal: Journal, notify: Notify
) -> tuple[DenseRecord, SearchTrace, SearchRecord]:
    architecture, request, metric = resolved.architecture, resolved.request, resolved.metric
    searched, kept = hold_out(calibration.to(resolved.context.device), request.holdout or 0)
    if request.fast:
        searched = searched.shuffled()
    with SkippableModel(model, architecture.blocks_of(model)) as skippable:
        passes, reason = _prepare(skippable, resolved, searched, notify)
        held_out = passes.beside(kept.sequences, kept.loss_mask) if kept else None
        scoring = Scoring(
            passes, journal, tokenizer, notify, fast=request.fast, winners=resolved.beam_width, held_out=held_out
        )
        _, engine = scoring.scorer(metric)
        how = _how(resolved, scoring, engine, reason)
        journal.of_sets = isinstance(metric, LogitMetric | ModelMetric)
        journal.open(_identity(resolved, calibration, how), resume=request.resume)
        if len(journal):
            notify(Notice(f"{journal.path} holds {len(journal)} measurements: the search goes on from there."))
        dense = resolved.extended.dense if resolved.extended else _measure_dense(scoring, resolved)
        trace = _search_to_target(resolved, dense, scoring, notify)
        if words := overfitting_note(trace.steps):
            notify(Notice(words))
        trace.sample_generation = generate_sample(
            skippable, tokenizer, trace.removals, architecture.longest_sequence, notify
        )
    return dense, trace, how


def _prepare(
    skippable: SkippableModel, resolved: ResolvedSearch, calibration: Calibration, notify: Notify
) -> tuple[Passes, str | None]:
    request = resolved.request
    notify(TaskStarted(task := "Checking the engine"))
    prepared = prepare_passes(
        skippable,
        calibration.sequences,
        notify,
        loss_mask=calibration.loss_mask,
        memory=request.memory,
        batch_size=request.batch_size,
        looks=LOOKS if request.fast else 1,
    )
    notify(TaskFinished(task))
    return prepared


def _how(resolved: ResolvedSearch, scoring: Scoring, engine: Engine, reason: str | None) -> SearchRecord:
    request, metric = resolved.request, resolved.metric
    return SearchRecord(
        strategy=resolved.strategy_name,
        beam_width=resolved.beam_width if resolved.strategy_name == "beam" else None,
        metric=metric.name,
        remove=resolved.remove,
        ratio=request.target.ratio,
        protect_first=resolved.context.protection.first,
        protect_last=resolved.context.protection.last,
        protect=resolved.context.protection.blocks,
        dtype=dtype_name(resolved.context.dtype),
        device=resolved.context.device.type,
        batch_size=scoring.passes.budget.sequences,
        fast=request.fast,
        holdout=request.holdout or 0.0,
        held_out=sum(map(len, scoring.held_out.batches)) if scoring.held_out else 0,
        engine=engine,
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


@dataclass
class SearchTrace:
    """How a search went: its steps, what is gone in the end, and what the removal that was not made would have cost.

    `next_increase` is in nats per token above the dense model; None where none was tried that the target did not allow.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    next_increase: float | None = None
    sample_generation: SampleGeneration | None = None


def _search_to_target(resolved: ResolvedSearch, dense: DenseRecord, scoring: Scoring, notify: Notify) -> SearchTrace:
    """Search until the target is met, or the next removal would miss it.

    Raises:
        UsageError: not even one removal is within the target.
    """
    if resolved.strategy_name == "refine" and isinstance(resolved.target, LossTarget):
        # It exchanges at its last size, which a greedy search tells; and what that measured is known from then on.
        greedily = _search_to_target(replace(resolved, strategy_name="greedy"), dense, scoring, notify)
        refined = _run_steps(replace(resolved, remove=len(greedily.removals)), dense, scoring, notify)
        return replace(refined, next_increase=greedily.next_increase)
    trace = _run_steps(resolved, dense, scoring, notify)
    if len(trace.removals) == len(resolved.gone):
        assert isinstance(resolved.target, LossTarget)
        assert trace.next_increase is not None
        raise UsageError(
            f"The {'next' if resolved.gone else 'first'} removal would put the loss {trace.next_increase:.4f} nats per "
            f"token above the dense model's, and {resolved.target.most:.4f} are allowed.",
            hint=f"Allow more: a larger {option_of(resolved.target.name)}. With --resume, nothing is measured again.",
        )
    return trace


def _run_steps(resolved: ResolvedSearch, dense: DenseRecord, scoring: Scoring, notify: Notify) -> SearchTrace:
    metric, target = resolved.metric, resolved.target
    trace = SearchTrace(list(resolved.extended.steps) if resolved.extended else [], resolved.gone)
    assert target is not None
    compared = _comparison(resolved, scoring)
    notify(
        SearchStarted(
            resolved.architecture.block_count, resolved.remove, len(trace.steps), _evaluations(resolved, scoring)
        )
    )
    problem = Problem(
        scoring.scorer(metric)[0],
        resolved.removable.candidates,
        resolved.remove,
        removed=resolved.gone,
        score_spans=scoring.span_scorer(metric, resolved.remove),
        width=resolved.beam_width,
        swapped=lambda e: notify(BlocksSwapped(e.restored, e.removed, e.before, e.after)),
    )
    for choice in _choices(resolved, problem, notify):
        loss = scoring.loss(choice.removals, scores_are_losses=metric.name == "nll")
        if not target.allows(loss - dense.loss):
            trace.next_increase = loss - dense.loss
            break
        step = _step(choice, trace.removals, loss, resolved.architecture.kinds)
        if compared:
            there = compared.compare(choice.removals, partial(_perplexity, block=choice.block))
            step = step.model_copy(update={"held_out": there})
        trace.steps.append(step)
        trace.removals = choice.removals
        scoring.journal.sync()
        notify(BlockRemoved(len(trace.steps), step.block, step.score, step.perplexity, step.removals))
        if target.met(trace.removals):
            break
    notify(TaskFinished("Search"))
    return trace


def _choices(resolved: ResolvedSearch, problem: Problem, notify: Notify) -> Iterator[Choice]:
    """Give one size after another. Where no number of removals is asked for, it is no error that no more may go."""
    choices = resolved.strategy.search(problem)
    if not isinstance(resolved.target, LossTarget):
        yield from choices
        return
    try:
        yield from choices
    except UnsupportedModelError as error:
        notify(Notice(f"The search ends here: {error.message}"))


def _record(
    resolved: ResolvedSearch, dense: DenseRecord, trace: SearchTrace, speedup_timer: SpeedupTimer
) -> TargetRecord | None:
    """Say what was to be reached, and what was; a speedup is timed once more, on the blocks that were found."""
    request, target = resolved.request.target, resolved.target
    assert target is not None
    if isinstance(target, LossTarget):
        increase = math.log(trace.steps[-1].perplexity) - dense.loss
        return target.record(increase, trace.next_increase)
    if target.counts_blocks:
        return None
    if target.name == "target_speedup":
        return speedup_timer.record(target, trace.removals)
    serving = resolved.context.serving(request) if target.name == "target_memory" else None
    return target.record(trace.removals, serving)


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
        swaps=tuple(SwapRecord(**vars(swap)) for swap in choice.swaps),
    )


def _identity(resolved: ResolvedSearch, calibration: Calibration, how: SearchRecord) -> dict[str, Any]:
    """Say what a journal's measurements depend on; how many blocks go in the end is not among it."""
    return {
        "sleb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": resolved.architecture.record.model_dump(mode="json", exclude={"id", "revision"}),
        "calibration": calibration.record.to_data(),
        "search": how.model_dump(mode="json", exclude={"remove", "ratio", "target"}),
    }


def _measure_dense(scoring: Scoring, resolved: ResolvedSearch) -> DenseRecord:
    scoring.notify(TaskStarted(task := "Measuring the dense model", scoring.sequences, "sequences"))
    loss = scoring.loss((), advanced=lambda done: scoring.notify(TaskAdvanced(task, done)))
    scoring.notify(TaskFinished(task))
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of {resolved.architecture.source.id} itself is {loss} in {dtype_name(resolved.context.dtype)}.",
            hint="Use a wider data type: --dtype float32.",
        )
    compared = _comparison(resolved, scoring)
    return DenseRecord(loss=loss, perplexity=math.exp(loss), held_out=compared.dense() if compared else None)


def _comparison(resolved: ResolvedSearch, scoring: Scoring) -> HeldOut | None:
    """Choose how the sequences that are held out are compared with the others; None where there are none."""
    losses = partial(scoring.losses, scores_are_losses=resolved.metric.name == "nll")
    return HeldOut(losses, scoring.held_out_losses, resolved.remove) if scoring.held_out else None


def _evaluations(resolved: ResolvedSearch, scoring: Scoring) -> tuple[int, ...]:
    removed = resolved.extended.removals if resolved.extended else ()
    candidates = len(resolved.removable.candidates(removed))
    sets = resolved.strategy.evaluations(candidates, resolved.remove - len(removed), resolved.beam_width)
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
