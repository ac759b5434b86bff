"""`sleb search`: from a model to a plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import Passes, prepare_passes
from sleb_cli.engine.forward.placement import open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.sample_generation import generate_sample
from sleb_cli.engine.search.bad_sequences import leave_out_bad, require_sound
from sleb_cli.engine.search.choices import Choice
from sleb_cli.engine.search.held_out import HeldOut, hold_out, overfitting_note
from sleb_cli.engine.search.journal import Journal, journal_of, saved_walk_of
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.resolve import ResolvedSearch, resolve_search, with_target
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.speedup import SpeedupTimer
from sleb_cli.engine.search.strategies import Problem
from sleb_cli.engine.search.targets import LossTarget, option_of
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.events import (
    SEARCH_TASK,
    BlockRemoved,
    BlocksSwapped,
    Notice,
    Notify,
    SearchStarted,
    TaskFinished,
    task,
)
from sleb_cli.plan import (
    DenseRecord,
    Engine,
    MetricRecord,
    Plan,
    SampleGeneration,
    SearchRecord,
    Step,
    SwapRecord,
    TargetRecord,
)
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import differences
from sleb_cli.requests import SearchRequest
from sleb_cli.version import __version__
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    ModelError,
    ModelMetric,
    PlanError,
    UnsupportedModelError,
    UsageError,
)


class SearchInputs:
    """What all searches of one model on one text share: tokenizer, model and text, loaded once."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._loaded: tuple[Any, Callable[[], SkippableModel], Calibration] | None = None

    def load(self, resolved: ResolvedSearch, notify: Notify) -> tuple[Any, Callable[[], SkippableModel], Calibration]:
        """Return the tokenizer, a function that returns the model, and the calibration sequences."""
        if self._loaded is None:
            tokenizer = load_tokenizer(resolved.architecture.source)
            # Loaded at first use, so that a missing text is reported before gigabytes are read.
            model = cache(partial(open_dense, resolved.architecture, resolved.placement, notify))
            calibration = self.group.from_main(
                lambda: calibrate(resolved.calibration, tokenizer, lambda: model().model, notify)
            )
            if resolved.request.skip_bad_sequences:
                calibration = leave_out_bad(resolved.request, calibration, model, self.group, notify)
            self._loaded = tokenizer, model, calibration
        return self._loaded


def find_removals(
    request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup | None = None
) -> Plan:
    """Search for the blocks that the model can best do without, alone or together with other processes.

    Measurements are kept in a journal next to `request.plan_file`; delete it once the plan is written.

    Raises:
        SlebError: a subclass that fits, if the request is impossible.
    """
    group = group or ProcessGroup()
    resolved = group.one_first(lambda: resolve_search(request, registry, notify))
    return run_search(resolved, SearchInputs(group), registry, notify)


def run_search(resolved: ResolvedSearch, inputs: SearchInputs, registry: Registry, notify: Notify) -> Plan:
    """Run a resolved search on inputs that it may share with others of the same model and text.

    Raises:
        SlebError: a subclass that fits, for problems that only show once the model and the text are read.
    """
    started, request, group = time.monotonic(), resolved.request, inputs.group
    tokenizer, model, calibration = inputs.load(resolved, notify)
    _require_continuation(resolved, calibration)
    watch = resolved.architecture.source.watch
    journal = Journal(journal_of(request.plan_file) if group.is_main else None, watch.require_unchanged)
    speedup_timer = SpeedupTimer(resolved.context, lambda: model().model, request, group)
    if resolved.target is None:
        resolved = with_target(resolved, speedup_timer.target(resolved.removable.candidates), notify)
    try:
        with watch.unchanged():
            dense, trace, search = _search(resolved, model(), tokenizer, calibration, journal, group, notify)
        target = _target_record(resolved, dense, trace, speedup_timer)
        search = search.model_copy(update={"remove": len(trace.removals), "target": target})
    except BaseException:
        if len(journal) and journal.path:
            notify(Notice(f"All measurements are kept in {journal.path}: rerun with --resume to continue."))
        raise
    finally:
        journal.close()
    return Plan(
        schema_version=1,
        sleb_version=__version__,
        model=resolved.architecture.record,
        calibration=calibration.record,
        search=search,
        dense=dense,
        removals=trace.removals,
        steps=tuple(trace.steps),
        sample_generation=trace.sample_generation,
        environment=environment_record(registry.third_party(), resolved.context.device, time.monotonic() - started),
    )


def _require_continuation(resolved: ResolvedSearch, calibration: Calibration) -> None:
    """Check that the extended plan was searched on the same tokens, with the same settings.

    Raises:
        PlanError: it was not; the message names the differences.
    """
    plan, request = resolved.extended, resolved.request
    if plan is None:
        return
    names = ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout", "load_in")
    found: dict[str, Any] = {name: getattr(request, name) for name in names}
    found |= {"dtype": dtype_name(resolved.context.dtype), "protect": resolved.context.protection.blocks}
    expected = {name: getattr(plan.search, name) for name in found}
    found["metrics"], expected["metrics"] = _across_versions(resolved.metrics), _across_versions(plan.search.metrics)
    if not plan.search.metrics:
        # Earlier versions recorded no metrics. The names of sleb's own have always been theirs alone.
        found["metrics"] = {name: record for name, record in found["metrics"].items() if not _is_own(record)}
    differing = differences(
        {"search": found, "calibration": calibration.record.to_data()},
        {"search": expected, "calibration": plan.calibration.to_data()},
    )
    if differing:
        raise PlanError(
            f"This search cannot continue from {request.extend} ({differing}).",
            hint="Leave out these options, so that the plan sets them, name the text it was calibrated on, and use the "
            "same version of the metric.",
        )


def _across_versions(metrics: Mapping[str, MetricRecord]) -> dict[str, Any]:
    """Return the records of metrics as another version of sleb can extend them: without the code of its own ones."""
    return {
        name: record.model_dump(exclude={"version", "code"} if record.package == "sleb" else None)
        for name, record in metrics.items()
    }


def _is_own(record: Mapping[str, Any]) -> bool:
    """Whether a metric is one of sleb's own, and depends on nothing that it would have named."""
    return bool(record["package"] == "sleb" and not record["fingerprint"])


def _search(
    resolved: ResolvedSearch,
    dense_model: SkippableModel,
    tokenizer: Any,
    calibration: Calibration,
    journal: Journal,
    group: ProcessGroup,
    notify: Notify,
) -> tuple[DenseRecord, SearchTrace, SearchRecord]:
    architecture, request, metric = resolved.architecture, resolved.request, resolved.metric
    searched, kept = hold_out(calibration.to(dense_model.device), request.holdout or 0)
    if request.fast:
        searched = searched.shuffled()
    with dense_model as skippable:
        passes, reason = _prepare(skippable, resolved, searched, group, notify)
        held_out = passes.over(kept.sequences, kept.loss_mask) if kept else None
        scoring = Scoring(
            passes,
            journal,
            tokenizer,
            notify,
            fast=bool(request.fast),
            winners=resolved.beam_width,
            held_out=held_out,
            group=group,
            require_sound=cache(
                partial(require_sound, architecture.source.id, calibration, tokenizer, passes, journal, group)
            ),
        )
        _, engine = scoring.scorer(metric)
        record = _search_record(resolved, scoring, engine, reason)
        journal.of_sets = isinstance(metric, LogitMetric | ModelMetric)
        identity = _identity(resolved, calibration, record)
        journal.open(identity, resume=request.resume)
        saved_walk = saved_walk_of(request.plan_file, identity, group.rank)
        if not request.resume and group.is_main:
            saved_walk.delete()
        scoring = replace(scoring, passes=replace(passes, saved_walk=saved_walk))
        journal.known = group.from_main(lambda: journal.known)
        if len(journal) and journal.path:
            notify(Notice(f"Continuing with the {len(journal)} measurements in {journal.path}."))
        dense = resolved.extended.dense if resolved.extended else _measure_dense(scoring, resolved)
        trace = _search_to_target(resolved, dense, scoring, notify)
        if warning := overfitting_note(trace.steps):
            notify(Notice(warning))
        if resolved.sample_tokens:
            limit = architecture.longest_sequence
            trace.sample_generation = group.from_main(
                lambda: generate_sample(skippable, tokenizer, trace.removals, resolved.sample_tokens, limit, notify)
            )
    return dense, trace, record


def _prepare(
    skippable: SkippableModel,
    resolved: ResolvedSearch,
    calibration: Calibration,
    group: ProcessGroup,
    notify: Notify,
) -> tuple[Passes, str | None]:
    request = resolved.request
    asked = None if request.memory is None else str(request.memory)
    # The same in all processes, so that they have the same batches.
    memory, host_memory = (
        min(group.gather(available_memory(device, asked))) for device in (skippable.device, torch.device("cpu"))
    )
    with task(notify, "Checking the engine"):
        return prepare_passes(
            skippable,
            calibration.sequences,
            notify,
            loss_mask=calibration.loss_mask,
            memory=str(memory),
            batch_size=request.batch_size,
            min_batches=LOOKS if request.fast else 1,
            host_memory=str(host_memory),
            spill_to=request.plan_file.absolute().parent,
        )


def _search_record(resolved: ResolvedSearch, scoring: Scoring, engine: Engine, reason: str | None) -> SearchRecord:
    request, metric = resolved.request, resolved.metric
    return SearchRecord(
        strategy=resolved.strategy_name,
        beam_width=resolved.beam_width if resolved.strategy_name == "beam" else None,
        metric=metric.name,
        metrics=resolved.metrics,
        remove=resolved.remove,
        ratio=None if request.ratio is None else str(request.ratio),
        protect_first=resolved.context.protection.first,
        protect_last=resolved.context.protection.last,
        protect=resolved.context.protection.blocks,
        dtype=dtype_name(resolved.context.dtype),
        device=resolved.context.device.type,
        load_in=request.load_in,
        batch_size=scoring.passes.budget.sequences,
        fast=bool(request.fast),
        holdout=request.holdout or 0.0,
        held_out=sum(map(len, scoring.held_out.batches)) if scoring.held_out else 0,
        engine=engine,
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


@dataclass
class SearchTrace:
    """The course of a search: its steps, the blocks removed in the end, and the cost of the removal not made.

    `next_increase` is that cost, in nats per token above the dense model; None if the target ruled out no removal.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    next_increase: float | None = None
    sample_generation: SampleGeneration | None = None


def _search_to_target(resolved: ResolvedSearch, dense: DenseRecord, scoring: Scoring, notify: Notify) -> SearchTrace:
    """Search until the target is met, or until the next removal would exceed it.

    Raises:
        UsageError: not even one removal is within the target.
    """
    if resolved.strategy_name == "refine" and isinstance(resolved.target, LossTarget):
        # It swaps only at its last size, which a greedy search finds; those measurements are not repeated.
        greedy = _search_to_target(replace(resolved, strategy_name="greedy"), dense, scoring, notify)
        refined = _run_steps(replace(resolved, remove=len(greedy.removals)), dense, scoring, notify)
        return replace(refined, next_increase=greedy.next_increase)
    trace = _run_steps(resolved, dense, scoring, notify)
    if len(trace.removals) == len(resolved.gone):
        assert isinstance(resolved.target, LossTarget)
        assert trace.next_increase is not None
        raise UsageError(
            f"The {'next' if resolved.gone else 'first'} removal would raise the loss {trace.next_increase:.4f} nats "
            f"per token above the dense model's; the limit is {resolved.target.most:.4f}.",
            hint=f"Increase {option_of(resolved.target.name)}. With --resume, nothing is measured again.",
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
        perplexity = partial(_perplexity, what=f"Without block {choice.block}", dtype=resolved.context.dtype)
        step = _step(choice, trace.removals, perplexity(loss), resolved.architecture.kinds)
        if compared:
            there = compared.compare(choice.removals, perplexity)
            step = step.model_copy(update={"held_out": there})
        trace.steps.append(step)
        trace.removals = choice.removals
        scoring.journal.sync()
        notify(BlockRemoved(len(trace.steps), step.block, step.score, step.perplexity, step.removals))
        if target.met(trace.removals):
            break
    notify(TaskFinished(SEARCH_TASK))
    return trace


def _choices(resolved: ResolvedSearch, problem: Problem, notify: Notify) -> Iterator[Choice]:
    """Yield one size after another; with a limit on the loss, running out of candidates ends the search."""
    choices = resolved.strategy.search(problem)
    if not isinstance(resolved.target, LossTarget):
        yield from choices
        return
    try:
        yield from choices
    except UnsupportedModelError as error:
        notify(Notice(f"The search stops here: {error.message}"))


def _target_record(
    resolved: ResolvedSearch, dense: DenseRecord, trace: SearchTrace, speedup_timer: SpeedupTimer
) -> TargetRecord | None:
    """Return the target and what was reached; time a speedup again, without the removed blocks."""
    request, target = resolved.request, resolved.target
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


def _step(choice: Choice, before: tuple[int, ...], perplexity: float, kinds: Sequence[str]) -> Step:
    """Return the record of a choice, `before` being the blocks removed at the previous size."""
    return Step(
        block=choice.block,
        kind=kinds[choice.block],
        score=choice.score,
        perplexity=perplexity,
        scores={block: score if score < math.inf else None for block, score in choice.outcome.scores.items()},
        race=choice.outcome.race,
        removals=None if choice.removals == (*before, choice.block) else choice.removals,
        swaps=tuple(SwapRecord(**vars(swap)) for swap in choice.swaps),
    )


def _identity(resolved: ResolvedSearch, calibration: Calibration, search: SearchRecord) -> dict[str, Any]:
    """Return all that a journal's measurements depend on; the number of removals is not part of it."""
    return {
        "sleb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": resolved.architecture.record.model_dump(mode="json", exclude={"id", "revision"}),
        "behavior": resolved.architecture.source.behavior,
        "calibration": calibration.record.to_data(),
        "search": search.model_dump(mode="json", exclude={"remove", "ratio", "target"}),
    }


def _measure_dense(scoring: Scoring, resolved: ResolvedSearch) -> DenseRecord:
    with task(scoring.notify, "Measuring the dense model", scoring.sequences, "sequences") as advance:
        loss = scoring.loss((), advanced=advance)
    held_out = scoring.held_out_losses(()) if scoring.held_out else []
    if not all(map(math.isfinite, (loss, *held_out))):
        scoring.require_sound()
    perplexity = partial(_perplexity, what=f"In {resolved.architecture.source.id}", dtype=resolved.context.dtype)
    compared = _comparison(resolved, scoring)
    return DenseRecord(
        loss=loss, perplexity=perplexity(loss), held_out=compared.dense(perplexity) if compared else None
    )


def _comparison(resolved: ResolvedSearch, scoring: Scoring) -> HeldOut | None:
    """Return the comparison with the held-out sequences; None if none are held out."""
    losses = partial(scoring.losses, scores_are_losses=resolved.metric.name == "nll")
    return HeldOut(losses, scoring.held_out_losses, resolved.remove) if scoring.held_out else None


def _evaluations(resolved: ResolvedSearch, scoring: Scoring) -> tuple[int, ...]:
    removed = resolved.extended.removals if resolved.extended else ()
    candidates = len(resolved.removable.candidates(removed))
    sets = resolved.strategy.evaluations(candidates, resolved.remove - len(removed), resolved.beam_width)
    return tuple(count * scoring.sequences for count in sets)


def _perplexity(loss: float, what: str, dtype: torch.dtype) -> float:
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise ModelError(
            f"{what}, the calibration loss is {loss} nats per token in {dtype_name(dtype)}, and the perplexity is not "
            "finite.",
            hint=wider_range(dtype),
        )
    return perplexity
