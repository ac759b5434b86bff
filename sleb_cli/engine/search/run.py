"""`sleb search`: load a model and its text, remove block after block, and record what was found."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
import transformers

from sleb_cli.asked.text_names import REFERENCE_PRESETS
from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.forward.forecast import announce, block_operations
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.placement import open_dense
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.sample_generation import generate_sample
from sleb_cli.engine.search.bad_sequences import find_bad, unsound
from sleb_cli.engine.search.choices import Choice, NoBlockLeft
from sleb_cli.engine.search.held_out import ERROR, compare_growth, hold_out, overfitting_note
from sleb_cli.engine.search.journal import Journal, open_journal
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.scoring import Scoring, engine_of
from sleb_cli.engine.search.settings import SearchSettings
from sleb_cli.engine.search.speedup import time_target
from sleb_cli.engine.search.strategies import Problem
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget, count_removals, perplexity_ratio
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.events import SEARCH_TASK, BlockRemoved, BlocksSwapped, Notice, Notify, SearchStarted, TaskFinished, task
from sleb_cli.plan import CalibrationRecord, DenseRecord, HeldOutRecord, Plan, SampleGeneration, SearchRecord, Step
from sleb_cli.records import THIS_VERSION, differences
from sleb_cli.requests import DEMO, journal_of
from sleb_cli.version import __version__
from sleb_plugins import HiddenStateMetric, LogitMetric, ModelError, ModelMetric, PlanError, UsageError

LARGEST_LOSS = math.log(sys.float_info.max)
"""In nats per token; the perplexity of a larger one is no finite number."""

RACED = 7
"""On about how many sequences a race scores a candidate, on average."""


@dataclass(frozen=True)
class SearchInputs:
    """What all searches of one model on one text share, loaded once; the processes, and the listener for events."""

    tokenizer: Any
    model: SkippableModel
    calibration: Calibration
    group: ProcessGroup
    notify: Notify


def find_removals(settings: SearchSettings, group: ProcessGroup, notify: Notify) -> Plan:
    """Search for the blocks that the model can best do without, alone or together with other processes.

    Measurements are kept in a journal next to the plan's file; delete it once the plan is written.

    Raises:
        SlebError: a subclass that fits, for problems that only show once the model is loaded.
    """
    started = time.monotonic()
    return run_search(settings, load_inputs(settings, group, notify), started)


def load_inputs(settings: SearchSettings, group: ProcessGroup, notify: Notify) -> SearchInputs:
    """Load the tokenizer, the text and the model.

    Raises:
        SlebError: a subclass that fits, for problems that only show once they are read.
    """
    tokenizer = load_tokenizer(settings.architecture.source)
    # Loaded at first use, so that a missing text is reported before gigabytes are read.
    model = cache(partial(open_dense, settings.architecture, settings.placement, notify))
    calibration = group.from_main(lambda: calibrate(settings.text, tokenizer, lambda: model().model, notify))
    if settings.extended:
        _require_continuation(settings, settings.extended, calibration)
    return SearchInputs(tokenizer, model(), calibration, group, notify)


def _require_continuation(settings: SearchSettings, plan: Plan, calibration: Calibration) -> None:
    """Check that the extended plan was searched on the same tokens, with the same settings.

    Raises:
        PlanError: it was not; the message names the differences.
    """
    names = ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout")
    found: dict[str, Any] = {name: settings.options.get(name) for name in names}
    found |= {"dtype": dtype_name(settings.placement.dtype), "protect": settings.removable.protection.blocks}
    expected = {name: getattr(plan.search, name) for name in found}
    for search, implementation in ((found, settings.implementation), (expected, plan.search.implementation)):
        # Another version of sleb can extend the plan, so the code of its own metrics does not count.
        excluded = {"version", "code"} if implementation and implementation.package == "sleb" else None
        search["implementation"] = implementation and implementation.model_dump(exclude=excluded)
    differing = differences(
        {"search": found, "calibration": calibration.record.to_data()},
        {"search": expected, "calibration": plan.calibration.to_data()},
    )
    if differing:
        raise PlanError(
            f"This search cannot continue the plan ({differing}).",
            hint="Leave out these options so that the plan sets them. Use the text it was calibrated on, and the same "
            "version of the metric.",
        )


def run_search(settings: SearchSettings, inputs: SearchInputs, started: float) -> Plan:
    """Run a search that began at `started`, on inputs that it may share with others.

    Raises:
        SlebError: a subclass that fits, for problems that only show once the model runs.
    """
    model, group, notify = inputs.model, inputs.group, inputs.notify
    if settings.target is None:
        target = time_target(settings, model.model, group, notify)
        most = count_removals(target, settings.removable, settings.strategy_name, settings.gone, notify)
        settings = replace(settings, target=target, remove=most)
    unchanged = settings.architecture.source.watch.unchanged
    searched, held = hold_out(inputs.calibration.to(model.device), settings.holdout)
    with unchanged(), model, task(notify, "Checking the engine"):
        passes, reason = _prepare(settings, inputs, searched.shuffled() if settings.fast else searched)
    held_out = passes.over(held.sequences, held.loss_mask) if held else None
    record = _search_record(settings, passes, held_out, reason)
    with _open_journal(settings, inputs, record) as journal, unchanged():
        with model:
            scoring = _scoring(settings, inputs, passes, held_out, journal)
            dense = settings.extended.dense if settings.extended else _measure_dense(settings, scoring)
            trace = _search_to_target(settings, dense, scoring)
            if warning := overfitting_note(trace.steps):
                notify(Notice(warning))
            sample = _sample(settings, inputs, trace.removals)
        assert settings.target is not None
        target_record = settings.target.record(trace.removals, trace.increase, trace.next_increase)
    return Plan(
        **THIS_VERSION,
        request=_options(settings, record, inputs.calibration.record),
        model=settings.architecture.record,
        calibration=inputs.calibration.record,
        search=record.model_copy(update={"remove": len(trace.removals), "target": target_record}),
        dense=dense,
        removals=trace.removals,
        steps=tuple(trace.steps),
        sample_generation=sample,
        environment=environment_record(dict(settings.plugins), settings.placement.device, time.monotonic() - started),
    )


@dataclass
class Trace:
    """The course of a search: its steps, the blocks removed in the end, and the cost of the removal not made.

    The costs are increases of the loss over the dense model's, in nats per token. `next_increase` is None if no removal
    was ruled out.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    increase: float = 0.0
    next_increase: float | None = None


def _search_to_target(settings: SearchSettings, dense: DenseRecord, scoring: Scoring) -> Trace:
    """Search until the target is met, or until the next removal would exceed it.

    Raises:
        UsageError: not even one removal is within the target.
    """
    target = settings.target
    if settings.strategy_name == "refine" and isinstance(target, PerplexityTarget):
        # It swaps only at its last size, which a greedy search finds; those measurements are not repeated.
        greedy = _search_to_target(replace(settings, strategy_name="greedy"), dense, scoring)
        refined = _remove_blocks(replace(settings, remove=len(greedy.removals)), dense, scoring)
        # A swap lowers the score, which may be another than the limited loss.
        if refined.next_increase is None:
            return replace(refined, next_increase=greedy.next_increase)
        scoring.notify(Notice(f"Kept the greedy result: after swapping, perplexity is over {target.limit:g}x."))
        return greedy
    trace = _remove_blocks(settings, dense, scoring)
    if isinstance(target, PerplexityTarget) and len(trace.removals) == len(settings.gone):
        assert trace.next_increase is not None
        raise UsageError(
            f"The {'next' if settings.gone else 'first'} removal would raise perplexity to "
            f"{perplexity_ratio(trace.next_increase):.4g} times the dense model's; the limit is {target.limit:g}.",
            hint="Increase --max-perplexity-ratio. With --resume, no block is scored again.",
        )
    return trace


def _remove_blocks(settings: SearchSettings, dense: DenseRecord, scoring: Scoring) -> Trace:
    """Remove one block after the other, as the strategy chooses, until the target is met or would be exceeded."""
    target, notify = settings.target, scoring.notify
    assert target is not None
    trace = Trace(list(settings.extended.steps) if settings.extended else [], settings.gone)
    _announce(settings, scoring)
    notify(SearchStarted(settings.architecture.block_count, settings.remove, len(trace.steps)))
    problem = Problem(
        scoring.score,
        settings.removable.candidates,
        settings.remove,
        removed=settings.gone,
        score_spans=partial(scoring.score_spans, longest=settings.remove),
        swapped=lambda swap: notify(BlocksSwapped(**dict(swap))),
    )
    try:
        for choice in settings.strategy.search(problem):
            loss = fmean(scoring.losses(choice.removals))
            increase = loss - dense.loss
            if not target.allows(increase):
                trace.next_increase = increase
                break
            step = _step(choice, trace.removals, loss, settings, scoring)
            trace.steps.append(step)
            trace.removals, trace.increase = choice.removals, increase
            scoring.journal.sync()
            notify(BlockRemoved(len(trace.steps), step.block, step.score, step.perplexity, step.removals))
            if target.met(trace.removals):
                break
    except NoBlockLeft as error:
        if isinstance(target, SizeTarget):
            raise
        notify(Notice(f"The search stops here: {error.message}"))
    notify(TaskFinished(SEARCH_TASK))
    return trace


def _announce(settings: SearchSettings, scoring: Scoring) -> None:
    """Tell how long the search will take. Candidates share a walk, and so run half of the blocks on average."""
    passes, metric, ids = scoring.passes, scoring.metric, scoring.passes.batches[0]
    if not isinstance(metric, LogitMetric | HiddenStateMetric):
        return  # a metric of weights is fast, and how long one of the whole model takes is not known
    blocks, candidates = settings.architecture.block_count, len(settings.removable.candidates(settings.gone))
    sets = settings.strategy.evaluations(candidates, settings.remove - len(settings.gone))
    left = sets * scoring.sequences - scoring.journal.evaluations
    each = (blocks / 2 if passes.forks else blocks) + scoring.skippable.head_blocks
    if isinstance(metric, HiddenStateMetric):
        each = blocks / candidates  # one run for all
    at_most = "at most " if settings.fast or settings.strategy_name == "refine" else ""
    share = min(1.0, RACED / scoring.sequences) if settings.fast else 1.0
    announce(
        scoring.notify,
        f"Search: {settings.remove} of {blocks} blocks, {at_most}{left:,} evaluations of {ids.shape[1]:,} tokens in "
        f"{dtype_name(settings.placement.dtype)}",
        left * ids.shape[1] * share * each * block_operations(scoring.skippable),
        scoring.skippable,
        ids,
        processes=scoring.journal.group.size,
    )


def _prepare(settings: SearchSettings, inputs: SearchInputs, calibration: Calibration) -> tuple[Passes, str | None]:
    def memory(device: torch.device) -> int:
        """The same in all processes, so that they have the same batches."""
        return min(inputs.group.gather(settings.memory or available_memory(device)))

    return prepare_passes(
        inputs.model,
        calibration.sequences,
        inputs.notify,
        loss_mask=calibration.loss_mask,
        memory=memory,
        batch_size=settings.batch_size,
        min_batches=LOOKS if settings.fast else 1,
        walks_together=True,
    )


def _search_record(
    settings: SearchSettings, passes: Passes, held_out: Passes | None, reason: str | None
) -> SearchRecord:
    metric, placement, protection = settings.metric, settings.placement, settings.removable.protection
    return SearchRecord(
        strategy=settings.strategy_name,
        metric=metric.name,
        implementation=settings.implementation,
        remove=settings.remove,
        protect_first=protection.first,
        protect_last=protection.last,
        protect=protection.blocks,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
        batch_size=passes.budget.sequences,
        fast=settings.fast,
        holdout=settings.holdout,
        held_out=sum(map(len, held_out.batches)) if held_out else 0,
        engine=engine_of(metric, passes),
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


def _options(settings: SearchSettings, search: SearchRecord, text: CalibrationRecord) -> dict[str, Any]:
    """Return the options that repeat this search, with those that the machine decided: they decide the last digits."""
    model = settings.architecture.record
    decided = {
        "model": model.id,
        "revision": None if model.id == DEMO else model.revision,
        "calibration": text.source,
        "sample_tokens": settings.sample_tokens,
        "dtype": search.dtype,
        "device": search.device,
        "batch_size": search.batch_size,
    }
    if text.source not in REFERENCE_PRESETS:  # whose samples count rows of text
        decided |= {"samples": text.sequences, "sequence_length": text.sequence_length}
    return {name: value for name, value in sorted({**settings.options, **decided}.items()) if value is not None}


def _open_journal(
    settings: SearchSettings, inputs: SearchInputs, record: SearchRecord
) -> AbstractContextManager[Journal]:
    """Open the journal of this search, named by all that measurements depend on; the number of removals is not."""
    source = settings.architecture.source
    identity = {
        "sleb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": settings.architecture.record.model_dump(mode="json", exclude={"id", "revision"}),
        "behavior": source.content_hash,
        "calibration": inputs.calibration.record.to_data(),
        "search": record.model_dump(mode="json", exclude={"remove", "target"}),
    }
    return open_journal(
        journal_of(settings.plan_file),
        identity,
        inputs.notify,
        resume=settings.resume,
        group=inputs.group,
        whole_models=isinstance(settings.metric, LogitMetric | ModelMetric),
        require_valid=source.watch.require_unchanged,
    )


def _scoring(
    settings: SearchSettings, inputs: SearchInputs, passes: Passes, held_out: Passes | None, journal: Journal
) -> Scoring:
    @cache
    def require_sound() -> None:
        whole = inputs.calibration.to(inputs.model.device)
        bad = inputs.group.from_main(lambda: find_bad(passes.over(whole.sequences, whole.loss_mask)))
        if bad:
            journal.forget()
            name, dtype = settings.architecture.source.id, settings.placement.dtype
            raise unsound(name, dtype, inputs.calibration, inputs.tokenizer, bad)

    return Scoring(
        settings.metric,
        passes,
        journal,
        inputs.tokenizer,
        inputs.notify,
        fast=settings.fast,
        held_out=held_out,
        require_sound=require_sound,
    )


def _measure_dense(settings: SearchSettings, scoring: Scoring) -> DenseRecord:
    with task(scoring.notify, "Measuring the dense model", scoring.sequences, "sequences") as advance:
        losses = scoring.losses((), advance=advance)
    held_out = scoring.losses((), held_out=True) if scoring.held_out else []
    if not all(map(math.isfinite, (*losses, *held_out))):
        scoring.require_sound()
    what, loss = f"In {settings.architecture.source.id}", fmean(losses)
    perplexity = _perplexity(loss, what, settings.placement.dtype)
    return DenseRecord(loss=loss, perplexity=perplexity, held_out=_held_out(settings, scoring, (), what))


def _step(choice: Choice, before: tuple[int, ...], loss: float, settings: SearchSettings, scoring: Scoring) -> Step:
    """Return the record of a choice, `before` being the blocks removed at the previous size."""
    what = f"Without block {choice.block}"
    return Step(
        block=choice.block,
        kind=settings.architecture.kinds[choice.block],
        score=choice.score,
        perplexity=_perplexity(loss, what, settings.placement.dtype),
        scores={block: score if score < math.inf else None for block, score in choice.outcome.scores.items()},
        race=choice.outcome.race,
        held_out=_held_out(settings, scoring, choice.removals, what),
        removals=None if choice.removals == (*before, choice.block) else choice.removals,
        swaps=choice.swaps,
    )


def _held_out(settings: SearchSettings, scoring: Scoring, removed: tuple[int, ...], what: str) -> HeldOutRecord | None:
    if scoring.held_out is None:
        return None
    loss = fmean(scoring.losses(removed, held_out=True))
    record = HeldOutRecord(loss=loss, perplexity=_perplexity(loss, what, settings.placement.dtype))
    if not removed:
        return record
    both = (scoring.losses, partial(scoring.losses, held_out=True))
    growth = ([new - old for old, new in zip(losses(()), losses(removed), strict=True)] for losses in both)
    searched, held_out = growth
    gap, error, overfits = compare_growth(searched, held_out, ERROR / settings.remove)
    return record.model_copy(update={"generalization_gap": gap, "standard_error": error, "overfits": overfits})


def _perplexity(loss: float, what: str, dtype: torch.dtype) -> float:
    if not loss < LARGEST_LOSS:
        raise ModelError(
            f"{what}, the calibration loss is {loss} nats per token in {dtype_name(dtype)}, so the perplexity is not "
            "finite.",
            hint=wider_range(dtype),
        )
    return math.exp(loss)


def _sample(settings: SearchSettings, inputs: SearchInputs, removals: tuple[int, ...]) -> SampleGeneration | None:
    if not settings.sample_tokens:
        return None
    longest = settings.architecture.longest_sequence
    generate = partial(generate_sample, inputs.model, inputs.tokenizer, removals, settings.sample_tokens, longest)
    return inputs.group.from_main(lambda: generate(inputs.notify))
