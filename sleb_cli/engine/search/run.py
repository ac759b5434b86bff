"""`sleb search`: load a model and its text, remove block after block, and record a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean

from sleb_cli.checks.strategies import GREEDY
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.bad_sequences import require_sound
from sleb_cli.engine.search.choices import Choice, NoBlockLeft, NoFiniteScore
from sleb_cli.engine.search.experts import ExpertMethod, search_experts
from sleb_cli.engine.search.held_out import hold_out, overfitting_note
from sleb_cli.engine.search.inputs import (
    SearchInputs,
    load_inputs,
    make_plan,
    open_search_journal,
    prepare_search,
    search_record,
    write_sample,
)
from sleb_cli.engine.search.losses import (
    measure_dense,
    measure_held_out,
    measure_together,
    perplexity,
)
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.scoring import Scoring, engine_of
from sleb_cli.engine.search.settings import BlockMethod, Method, Search
from sleb_cli.engine.search.strategies import ALGORITHMS, Problem
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget, perplexity_ratio
from sleb_cli.events import (
    SEARCH_TASK,
    BlockRemoved,
    BlocksSwapped,
    Notice,
    Notify,
    SearchStarted,
    TaskFinished,
    TaskStarted,
    task,
)
from sleb_cli.plan import DenseRecord, Plan, SearchRecord, Step
from sleb_cli.plugin_calls import REPORT
from sleb_plugins import HiddenStateMetric, LogitMetric, PluginError, UsageError


def find_removals(search: Search, group: ProcessGroup, notify: Notify) -> Plan:
    """Search for the blocks or experts that the model can best do without.

    A journal next to the plan's file keeps measurements; delete it once the plan is written.
    """
    inputs = load_inputs(search, group, notify)
    return _SEARCHES[type(search.method)](search, search.method, inputs)


def _search_blocks(search: Search, method: BlockMethod, inputs: SearchInputs) -> Plan:
    model = inputs.model
    source = search.architecture.source
    searched, reserved = hold_out(inputs.calibration.to(model.device), method.holdout)
    if method.fast:
        searched = searched.shuffled()
    with source.watch.unchanged(), model, task(inputs.notify, "Checking the engine"):
        min_batches = LOOKS if method.fast else 1
        passes, reason = prepare_search(search, inputs, searched, min_batches)
    held_out = None
    if reserved is not None:
        held_out = passes.over(reserved.sequences, reserved.loss_mask)
    record = _record(search, method, passes, held_out, reason)
    with open_search_journal(search, inputs, record) as journal, source.watch.unchanged(), model:
        scoring = Scoring(
            method.metric,
            passes,
            journal,
            inputs.tokenizer,
            inputs.notify,
            fast=method.fast,
            held_out=held_out,
            require_sound=cache(partial(require_sound, search, inputs, passes, journal)),
        )
        extended = search.extended
        dense = extended.dense if extended else measure_dense(scoring, source.id)
        trace = _search_to_target(method, extended, dense, scoring)
        warning = overfitting_note(trace.steps)
        if warning:
            inputs.notify(Notice(warning))
        sample = write_sample(search, inputs, trace.removals)
    target = method.target.record(trace.removals, trace.increase, trace.next_increase)
    return make_plan(
        search,
        inputs,
        record.model_copy(update={"remove": len(trace.removals), "target": target}),
        dense=dense,
        removals=trace.removals,
        steps=tuple(trace.steps),
        sample_generation=sample,
    )


_SEARCHES: Mapping[type[Method], Callable[..., Plan]] = {
    BlockMethod: _search_blocks,
    ExpertMethod: search_experts,
}


def _record(
    search: Search, method: BlockMethod, passes: Passes, held_out: Passes | None, reason: str | None
) -> SearchRecord:
    protection = method.removable.protection
    metric = method.metric
    held_out_sequences = 0
    if held_out is not None:
        held_out_sequences = sum(len(batch) for batch in held_out.batches)
    return search_record(
        search,
        passes,
        held_out_sequences,
        remove=method.remove,
        protect_first=protection.first,
        protect_last=protection.last,
        protect=protection.blocks,
        fast=method.fast,
        engine=engine_of(metric, passes),
        engine_reason=reason if isinstance(metric, LogitMetric | HiddenStateMetric) else None,
    )


@dataclass
class Trace:
    """The course of a search: its steps, and the blocks removed in the end.

    The increases are of the loss over the dense model's, in nats per token; the next removal's is
    None if none was ruled out.
    """

    steps: list[Step]
    removals: tuple[int, ...]
    increase: float = 0.0
    next_increase: float | None = None


def _search_to_target(
    method: BlockMethod, extended: Plan | None, dense: DenseRecord, scoring: Scoring
) -> Trace:
    target = method.target
    if method.strategy.swaps and isinstance(target, PerplexityTarget):
        # It swaps only at its last size, which a greedy search finds first; the journal has those
        # measurements.
        greedy = _search_to_target(replace(method, strategy=GREEDY), extended, dense, scoring)
        as_many = replace(method, remove=len(greedy.removals))
        refined = _remove_blocks(as_many, extended, dense, scoring)
        # A swap lowers the metric's score, but the target limits the loss.
        if refined.next_increase is None:
            return replace(refined, next_increase=greedy.next_increase)
        scoring.notify(
            Notice(f"Kept the greedy result: after swapping, perplexity is over {target.limit:g}x.")
        )
        return greedy
    trace = _remove_blocks(method, extended, dense, scoring)
    gone = extended.removals if extended else ()
    if isinstance(target, PerplexityTarget) and len(trace.removals) == len(gone):
        assert trace.next_increase is not None
        raise UsageError(
            f"The {'next' if gone else 'first'} removal would raise perplexity to "
            f"{perplexity_ratio(trace.next_increase):.4g} times the dense model's; the limit is "
            f"{target.limit:g}.",
            hint="Increase --max-perplexity-ratio. With --resume, no block is scored again.",
        )
    return trace


def _remove_blocks(
    method: BlockMethod, extended: Plan | None, dense: DenseRecord, scoring: Scoring
) -> Trace:
    target = method.target
    notify = scoring.notify
    trace = Trace([], ())
    if extended:
        trace = Trace(list(extended.steps), extended.removals)
    problem = Problem(
        scoring.score,
        method.removable.candidates,
        method.remove,
        removed=trace.removals,
        score_spans=partial(scoring.score_spans, longest=method.remove),
        swapped=lambda swap: notify(BlocksSwapped(**dict(swap))),
    )
    kinds = method.removable.architecture.kinds
    notify(TaskStarted(SEARCH_TASK, method.remove, "blocks"))
    notify(SearchStarted(len(kinds), method.remove, len(trace.steps)))
    choices: Iterable[Choice] = ALGORITHMS[method.strategy.name](problem)
    try:
        if method.strategy.measures_last and isinstance(target, SizeTarget):
            choices = _choices_until(target, choices)
            measure_together(scoring, [choice.removals for choice in choices])
        for choice in choices:
            increase = fmean(scoring.losses(choice.removals)) - dense.loss
            if not target.allows(increase):
                trace.next_increase = increase
                break
            step = _step(choice, trace.removals, method, scoring)
            trace.steps.append(step)
            trace.removals = choice.removals
            trace.increase = increase
            scoring.journal.sync()
            notify(
                BlockRemoved(
                    len(trace.steps), step.block, step.score, step.perplexity, step.removals
                )
            )
            if target.met(trace.removals):
                break
    except NoBlockLeft as error:
        if isinstance(target, SizeTarget):
            raise
        notify(Notice(f"The search stops here: {error.message}"))
    except NoFiniteScore as error:
        _blame_plugin_metric(method, scoring, error)
        raise
    notify(TaskFinished(SEARCH_TASK))
    return trace


def _choices_until(target: SizeTarget, choices: Iterable[Choice]) -> list[Choice]:
    chosen = []
    for choice in choices:
        chosen.append(choice)
        if target.met(choice.removals):
            break
    return chosen


def _blame_plugin_metric(method: BlockMethod, scoring: Scoring, error: NoFiniteScore) -> None:
    plugin = method.implementation
    if plugin.package == "sleb":
        return
    if all(math.isfinite(loss) for loss in scoring.losses(error.removals)):
        raise PluginError(
            f"The metric {method.metric.name!r} of {plugin.package} {plugin.version} scores every "
            f"candidate as NaN or infinite, such as block {error.removals[-1]}, although the model "
            "without it computes finite numbers.",
            hint=REPORT,
        ) from error


def _step(choice: Choice, before: tuple[int, ...], method: BlockMethod, scoring: Scoring) -> Step:
    block = choice.block
    opening = f"Without block {block}"
    loss = fmean(scoring.losses(choice.removals))
    scores: dict[int, float | None] = {}
    for candidate, score in choice.outcome.scores.items():
        scores[candidate] = score if score < math.inf else None
    only_added = choice.removals == (*before, block)
    return Step(
        block=block,
        kind=method.removable.architecture.kinds[block],
        score=choice.score,
        perplexity=perplexity(scoring, loss, opening),
        distance=loss if scoring.passes.skippable.ending.output else None,
        scores=scores,
        race=choice.outcome.race,
        held_out=measure_held_out(scoring, choice.removals, opening, method.remove),
        removals=None if only_added else choice.removals,
        swaps=choice.swaps,
    )
