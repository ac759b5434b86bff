"""`sleb search`: from a model to a plan."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.forecast import RACE_SEQUENCES, STREAMED_ROUNDS, Load, passes_by_size
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.pace import announce_passes
from sleb_cli.engine.forward.passes import Passes, prepare_passes
from sleb_cli.engine.forward.placement import open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.sample_generation import generate_sample
from sleb_cli.engine.search.bad_sequences import find_bad, unsound
from sleb_cli.engine.search.choices import Choice, NoBlockLeft
from sleb_cli.engine.search.held_out import ERROR, compare_growth, hold_out, overfitting_note
from sleb_cli.engine.search.journal import journal_of, open_journal
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.resolve import ResolvedSearch, resolve_search, with_target
from sleb_cli.engine.search.scoring import Scoring, engine_of
from sleb_cli.engine.search.speedup import SpeedupTimer
from sleb_cli.engine.search.strategies import Problem
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget, Target, perplexity_ratio
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import REFERENCE_PRESETS, Calibration, calibrate
from sleb_cli.events import SEARCH_TASK, BlockRemoved, BlocksSwapped, Notice, Notify, SearchStarted, TaskFinished, task
from sleb_cli.plan import (
    CalibrationRecord,
    DenseRecord,
    HeldOutRecord,
    MetricRecord,
    Plan,
    SampleGeneration,
    SearchRecord,
    Step,
    TargetRecord,
)
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import differences
from sleb_cli.requests import SearchRequest
from sleb_cli.version import __version__
from sleb_plugins import HiddenStateMetric, LogitMetric, ModelError, ModelMetric, PlanError, UsageError

LARGEST_LOSS = math.log(sys.float_info.max)
"""In nats per token; the perplexity of a larger one is no finite number."""


@dataclass(frozen=True)
class SearchInputs:
    """What all searches of one model on one text share, loaded once; the processes, and the listener for events."""

    tokenizer: Any
    model: SkippableModel
    calibration: Calibration
    group: ProcessGroup
    notify: Notify


def find_removals(request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup) -> Plan:
    """Search for the blocks that the model can best do without, alone or together with other processes.

    Measurements are kept in a journal next to `request.plan_file`; delete it once the plan is written.

    Raises:
        SlebError: a subclass that fits, if the request is impossible.
    """
    resolved = resolve_search(request, registry, notify, group)
    started = time.monotonic()
    return run_search(resolved, load_inputs(resolved, group, notify), started)


def load_inputs(resolved: ResolvedSearch, group: ProcessGroup, notify: Notify) -> SearchInputs:
    """Load the tokenizer, the text and the model.

    Raises:
        SlebError: a subclass that fits, for problems that only show once they are read.
    """
    tokenizer = load_tokenizer(resolved.architecture.source)
    # Loaded at first use, so that a missing text is reported before gigabytes are read.
    model = cache(partial(open_dense, resolved.architecture, resolved.placement, notify))
    calibration = group.from_main(lambda: calibrate(resolved.calibration, tokenizer, lambda: model().model, notify))

    _require_continuation(resolved, calibration)
    return SearchInputs(tokenizer, model(), calibration, group, notify)


def _require_continuation(resolved: ResolvedSearch, calibration: Calibration) -> None:
    """Check that the extended plan was searched on the same tokens, with the same settings.

    Raises:
        PlanError: it was not; the message names the differences.
    """
    plan, request = resolved.extended, resolved.request
    if plan is None:
        return
    names = ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout")
    found: dict[str, Any] = {name: getattr(request, name) for name in names}
    found |= {"dtype": dtype_name(resolved.placement.dtype), "protect": resolved.removable.protection.blocks}
    expected = {name: getattr(plan.search, name) for name in found}
    for search, implementation in ((found, resolved.implementation), (expected, plan.search.implementation)):
        search["implementation"] = implementation and _across_versions(implementation)
    differing = differences(
        {"search": found, "calibration": calibration.record.to_data()},
        {"search": expected, "calibration": plan.calibration.to_data()},
    )
    if differing:
        raise PlanError(
            f"This search cannot continue from {request.extend} ({differing}).",
            hint="Leave out these options so that the plan sets them. Use the text it was calibrated on, and the same "
            "version of the metric.",
        )


def _across_versions(metric: MetricRecord) -> dict[str, Any]:
    """Return the record of a metric as another version of sleb can extend it: without the code of its own ones."""
    return metric.model_dump(exclude={"version", "code"} if metric.package == "sleb" else None)


def run_search(resolved: ResolvedSearch, inputs: SearchInputs, started: float) -> Plan:
    """Run a resolved search that began at `started`, on inputs that it may share with others.

    Raises:
        SlebError: a subclass that fits, for problems that only show once the model runs.
    """
    request, model, notify = resolved.request, inputs.model, inputs.notify
    timer = SpeedupTimer(resolved, model.model, inputs.group, notify)
    if resolved.target is None:
        resolved = with_target(resolved, timer.target(), notify)
    unchanged = resolved.architecture.source.watch.unchanged
    searched, kept = hold_out(inputs.calibration.to(model.device), request.holdout or 0)
    with unchanged(), model, task(notify, "Checking the engine"):
        passes, reason = _prepare(inputs, searched.shuffled() if request.fast else searched, request)
    held_out = passes.over(kept.sequences, kept.loss_mask) if kept else None
    record = _search_record(resolved, passes, held_out, reason)
    with _scoring(resolved, inputs, passes, held_out, record) as scoring, unchanged():
        with model:
            dense = resolved.extended.dense if resolved.extended else _measure_dense(resolved, scoring)
            trace = _search_to_target(resolved, dense, scoring)
            if warning := overfitting_note(trace.steps):
                notify(Notice(warning))
            sample = _sample(resolved, scoring, trace.removals)
        target = _target_record(resolved.target, trace, timer)
    return Plan(
        schema_version=1,
        sleb_version=__version__,
        request=_options(resolved, record, inputs.calibration.record),
        model=resolved.architecture.record,
        calibration=inputs.calibration.record,
        search=record.model_copy(update={"remove": len(trace.removals), "target": target}),
        dense=dense,
        removals=trace.removals,
        steps=tuple(trace.steps),
        sample_generation=sample,
        environment=environment_record(dict(resolved.plugins), resolved.placement.device, time.monotonic() - started),
    )


def _prepare(inputs: SearchInputs, calibration: Calibration, request: SearchRequest) -> tuple[Passes, str | None]:
    asked = None if request.memory is None else str(request.memory)

    def memory(device: torch.device) -> int:
        """The same in all processes, so that they have the same batches."""
        return min(inputs.group.gather(available_memory(device, asked)))

    return prepare_passes(
        inputs.model,
        calibration.sequences,
        inputs.notify,
        loss_mask=calibration.loss_mask,
        memory=memory,
        batch_size=request.batch_size,
        min_batches=LOOKS if request.fast else 1,
        walks_together=True,
    )


def _search_record(
    resolved: ResolvedSearch, passes: Passes, held_out: Passes | None, reason: str | None
) -> SearchRecord:
    request, metric, placement = resolved.request, resolved.metric, resolved.placement
    protection = resolved.removable.protection
    return SearchRecord(
        strategy=resolved.strategy_name,
        metric=metric.name,
        implementation=resolved.implementation,
        remove=resolved.remove,
        protect_first=protection.first,
        protect_last=protection.last,
        protect=protection.blocks,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
        batch_size=passes.budget.sequences,
        fast=bool(request.fast),
        holdout=request.holdout or 0.0,
        held_out=sum(map(len, held_out.batches)) if held_out else 0,
        engine=engine_of(metric, passes),
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


def _options(resolved: ResolvedSearch, search: SearchRecord, text: CalibrationRecord) -> dict[str, Any]:
    """Return the options that repeat this search, with those that the machine decided: they decide the last digits."""
    model, presets = resolved.architecture.record, text.source in REFERENCE_PRESETS
    chosen = replace(
        resolved.request,
        model=model.id,
        revision=None if model.id == DEMO else model.revision,
        calibration=text.source,
        samples=None if presets else text.sequences,  # those of presets count rows of text
        sequence_length=None if presets else text.sequence_length,
        sample_tokens=resolved.sample_tokens,
        dtype=search.dtype,
        device=search.device,
        batch_size=search.batch_size,
    )
    return chosen.options


@contextmanager
def _scoring(
    resolved: ResolvedSearch, inputs: SearchInputs, passes: Passes, held_out: Passes | None, record: SearchRecord
) -> Iterator[Scoring]:
    """Open the journal of this search, and yield what scores its candidates."""
    request, source, group = resolved.request, resolved.architecture.source, inputs.group
    # All that measurements depend on; the number of removals is not part of it.
    identity = {
        "sleb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": resolved.architecture.record.model_dump(mode="json", exclude={"id", "revision"}),
        "behavior": source.behavior,
        "calibration": inputs.calibration.record.to_data(),
        "search": record.model_dump(mode="json", exclude={"remove", "target"}),
    }
    with open_journal(
        journal_of(request.plan_file),
        identity,
        inputs.notify,
        resume=request.resume,
        group=group,
        whole_models=isinstance(resolved.metric, LogitMetric | ModelMetric),
        require_valid=source.watch.require_unchanged,
    ) as journal:

        @cache
        def require_sound() -> None:
            whole = inputs.calibration.to(inputs.model.device)
            bad = group.from_main(lambda: find_bad(passes.over(whole.sequences, whole.loss_mask)))
            if bad:
                journal.forget()
                raise unsound(source.id, resolved.placement.dtype, inputs.calibration, inputs.tokenizer, bad)

        yield Scoring(
            resolved.metric,
            passes,
            journal,
            inputs.tokenizer,
            inputs.notify,
            fast=bool(request.fast),
            held_out=held_out,
            group=group,
            require_sound=require_sound,
        )


def _measure_dense(resolved: ResolvedSearch, scoring: Scoring) -> DenseRecord:
    with task(scoring.notify, "Measuring the dense model", scoring.sequences, "sequences") as advance:
        losses = scoring.losses((), advance=advance)
    held_out = scoring.losses((), held_out=True) if scoring.held_out else []
    if not all(map(math.isfinite, (*losses, *held_out))):
        scoring.require_sound()
    what, loss = f"In {resolved.architecture.source.id}", fmean(losses)
    return DenseRecord(
        loss=loss,
        perplexity=_perplexity(loss, what, resolved.placement.dtype),
        held_out=_held_out(resolved, scoring, (), what),
    )


@dataclass
class SearchTrace:
    """The course of a search: its steps, the blocks removed in the end, and the cost of the removal not made.

    The costs are increases of the loss over the dense model's, in nats per token. `next_cost` is None if no removal was
    ruled out.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    cost: float = 0.0
    next_cost: float | None = None


def _search_to_target(resolved: ResolvedSearch, dense: DenseRecord, scoring: Scoring) -> SearchTrace:
    """Search until the target is met, or until the next removal would exceed it.

    Raises:
        UsageError: not even one removal is within the target.
    """
    target = resolved.target
    if resolved.strategy_name == "refine" and isinstance(target, PerplexityTarget):
        # It swaps only at its last size, which a greedy search finds; those measurements are not repeated.
        greedy = _search_to_target(replace(resolved, strategy_name="greedy"), dense, scoring)
        refined = _run_steps(replace(resolved, remove=len(greedy.removals)), dense, scoring)
        # A swap lowers the score, which may be another than the limited loss.
        if refined.next_cost is None:
            return replace(refined, next_cost=greedy.next_cost)
        scoring.notify(Notice(f"Kept the greedy result: after swapping, perplexity is over {target.limit:g}x."))
        return greedy
    trace = _run_steps(resolved, dense, scoring)
    if isinstance(target, PerplexityTarget) and len(trace.removals) == len(resolved.gone):
        assert trace.next_cost is not None
        raise UsageError(
            f"The {'next' if resolved.gone else 'first'} removal would raise perplexity to "
            f"{perplexity_ratio(trace.next_cost):.4g} times the dense model's; the limit is {target.limit:g}.",
            hint="Increase --max-perplexity-ratio. With --resume, no block is scored again.",
        )
    return trace


def _run_steps(resolved: ResolvedSearch, dense: DenseRecord, scoring: Scoring) -> SearchTrace:
    target, remove, notify = resolved.target, resolved.remove, scoring.notify
    trace = SearchTrace(list(resolved.extended.steps) if resolved.extended else [], resolved.gone)
    sets = sets_by_size(resolved)
    evaluations = tuple(count * scoring.sequences for count in sets)
    _announce(resolved, scoring, sets)
    notify(SearchStarted(resolved.architecture.block_count, remove, len(trace.steps), evaluations))
    problem = Problem(
        scoring.score,
        resolved.removable.candidates,
        remove,
        removed=resolved.gone,
        score_spans=partial(scoring.score_spans, longest=remove),
        swapped=lambda swap: notify(BlocksSwapped(**dict(swap))),
    )
    try:
        for choice in resolved.strategy.search(problem):
            loss = fmean(scoring.losses(choice.removals))
            cost = loss - dense.loss
            if isinstance(target, PerplexityTarget) and not target.allows(cost):
                trace.next_cost = cost
                break
            trace.cost = cost
            step = _step(choice, trace.removals, loss, resolved, scoring)
            trace.steps.append(step)
            trace.removals = choice.removals
            scoring.journal.sync()
            notify(BlockRemoved(len(trace.steps), step.block, step.score, step.perplexity, step.removals))
            if isinstance(target, SizeTarget) and target.met(trace.removals):
                break
    except NoBlockLeft as error:
        if isinstance(target, SizeTarget | None):
            raise
        notify(Notice(f"The search stops here: {error.message}"))
    notify(TaskFinished(SEARCH_TASK))
    return trace


def sets_by_size(resolved: ResolvedSearch) -> Sequence[int]:
    """Return how many sets of blocks are scored at each size, or an upper bound."""
    candidates, more = len(resolved.removable.candidates(resolved.gone)), resolved.remove - len(resolved.gone)
    return resolved.strategy.evaluations(candidates, more)


def is_exact(resolved: ResolvedSearch) -> bool:
    """Whether it is known beforehand how many sets of blocks are scored."""
    chosen = resolved.strategy_name != "refine" and isinstance(resolved.target, SizeTarget)
    return chosen and not resolved.request.fast


def _announce(resolved: ResolvedSearch, scoring: Scoring, sets: Sequence[int]) -> None:
    """Tell how long the search will take; `sets` counts the sets of blocks that are scored at each size."""
    passes, metric, done = scoring.passes, scoring.metric, scoring.journal.evaluations
    total = sum(sets) * scoring.sequences
    if isinstance(metric, ModelMetric) or done >= total:
        return  # how long another metric takes on a whole model is not known
    left = 1 - done / total
    count, length = resolved.architecture.block_count, passes.batches[0].shape[1]
    at_most = "" if is_exact(resolved) else "at most "
    announce_passes(
        scoring.notify,
        f"Search: {resolved.remove} of {count} blocks, {at_most}{total - done:,} evaluations of "
        f"{length:,} tokens in {dtype_name(resolved.placement.dtype)}",
        scoring.skippable,
        [load.times(left) for load in search_loads(resolved, passes, scoring.held_out is not None)],
        passes.batches[0],
        passes.scoring(metric),
        forks=passes.forks,
        processes=scoring.group.size,
    )


def search_loads(resolved: ResolvedSearch, passes: Passes, holds_out: bool) -> Iterator[Load]:
    """Yield the work of each size of a search."""
    metric, gone, sets = resolved.metric, resolved.gone, sets_by_size(resolved)
    tokens, sequences = sum(batch.numel() for batch in passes.batches), sum(map(len, passes.batches))
    share, rounds = (min(1.0, RACE_SEQUENCES / sequences), STREAMED_ROUNDS) if resolved.request.fast else (1.0, 1)
    blocks = [block for block in range(resolved.architecture.block_count) if block not in gone]
    candidates = resolved.removable.candidates(gone)
    by_size = passes_by_size(
        blocks,
        candidates,
        len(sets),
        together=passes.forks and resolved.strategy_name != "contiguous",
        keeps=passes.budget.kept > 0 and resolved.strategy_name in ("greedy", "refine"),
    )
    for size, (scored, each) in enumerate(zip(sets, by_size, strict=False)):
        here = len(blocks) - size
        if isinstance(metric, LogitMetric):
            evaluated = scored * share * tokens
            yield Load(evaluated * each, evaluated, here * rounds)
        elif isinstance(metric, HiddenStateMetric):
            yield Load(here * tokens, 0, here)
        if metric.name != "nll" or holds_out:
            yield Load(here * tokens, tokens, here)  # the loss


def _step(choice: Choice, before: tuple[int, ...], loss: float, resolved: ResolvedSearch, scoring: Scoring) -> Step:
    """Return the record of a choice, `before` being the blocks removed at the previous size."""
    what = f"Without block {choice.block}"
    return Step(
        block=choice.block,
        kind=resolved.architecture.kinds[choice.block],
        score=choice.score,
        perplexity=_perplexity(loss, what, resolved.placement.dtype),
        scores={block: score if score < math.inf else None for block, score in choice.outcome.scores.items()},
        race=choice.outcome.race,
        held_out=_held_out(resolved, scoring, choice.removals, what),
        removals=None if choice.removals == (*before, choice.block) else choice.removals,
        swaps=choice.swaps,
    )


def _held_out(resolved: ResolvedSearch, scoring: Scoring, removed: tuple[int, ...], what: str) -> HeldOutRecord | None:
    if scoring.held_out is None:
        return None
    loss = fmean(scoring.losses(removed, held_out=True))
    record = HeldOutRecord(loss=loss, perplexity=_perplexity(loss, what, resolved.placement.dtype))
    if not removed:
        return record
    searched, held_out = (
        [new - old for old, new in zip(losses(()), losses(removed), strict=True)]
        for losses in (scoring.losses, partial(scoring.losses, held_out=True))
    )
    gap, error, overfits = compare_growth(searched, held_out, ERROR / resolved.remove)
    return record.model_copy(update={"generalization_gap": gap, "standard_error": error, "overfits": overfits})


def _perplexity(loss: float, what: str, dtype: torch.dtype) -> float:
    if not loss < LARGEST_LOSS:
        raise ModelError(
            f"{what}, the calibration loss is {loss} nats per token in {dtype_name(dtype)}, so the perplexity is not "
            "finite.",
            hint=wider_range(dtype),
        )
    return math.exp(loss)


def _sample(resolved: ResolvedSearch, scoring: Scoring, removals: tuple[int, ...]) -> SampleGeneration | None:
    if not resolved.sample_tokens:
        return None
    return scoring.group.from_main(
        lambda: generate_sample(
            scoring.skippable,
            scoring.tokenizer,
            removals,
            resolved.sample_tokens,
            resolved.architecture.longest_sequence,
            scoring.notify,
        )
    )


def _target_record(target: Target | None, trace: SearchTrace, timer: SpeedupTimer) -> TargetRecord | None:
    """Return the target and what was reached; time a speedup again, without the removed blocks."""
    if isinstance(target, PerplexityTarget):
        return target.record(trace.cost, trace.next_cost)
    if target is None or target.name in ("ratio", "remove"):
        return None
    return timer.record(target, trace.removals) if target.name == "target_speedup" else target.record(trace.removals)
