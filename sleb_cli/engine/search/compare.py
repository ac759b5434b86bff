"""`sleb search --compare`: one search per metric, on the same loaded model and the same calibration text."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sleb_cli.atomic import require_new_file
from sleb_cli.engine.device import free_memory
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.journal import delete_journal, journal_of
from sleb_cli.engine.search.resolve import ResolvedSearch, can_race, resolve_search
from sleb_cli.engine.search.run import load_inputs, run_search
from sleb_cli.engine.search.strategies import strategy_name
from sleb_cli.engine.search.targets import chosen_target
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import Plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEFAULT_STRATEGY, SearchRequest, StrategyName
from sleb_cli.results import ComparedRecord, CompareResult
from sleb_cli.version import __version__
from sleb_plugins import UsageError


def compare_removals(
    request: SearchRequest, registry: Registry, notify: Notify, group: ProcessGroup
) -> tuple[CompareResult, Plan]:
    """Search once for each entry of `request.compare`; return all results and the best plan.

    The best plan has the lowest perplexity on the held-out sequences, or on the calibration text if none are held out.
    Each search keeps its own journal next to `request.plan_file`; call `delete_journals` once the plan is written.

    Raises:
        UsageError: the entries cannot be compared. Raised before any work.
    """
    notify = _each_notice_once(notify)
    entries = parse_entries(request)
    resolved = resolve_compared(request, entries, registry, notify, group)
    inputs = load_inputs(resolved[0], group, notify)
    plans: list[Plan] = []
    for number, search in enumerate(resolved):
        notify(Notice(f"{number + 1} of {len(entries)}: {'@'.join(entries[number])}"))
        free_memory()  # each search takes a share of what is free, which the last one's states are not yet
        plans.append(run_search(search, inputs, time.monotonic()))
    compared = [
        ComparedRecord(
            metric=metric,
            strategy=strategy,
            removals=plan.removals,
            perplexity=plan.steps[-1].perplexity,
            held_out_perplexity=held_out.perplexity if (held_out := plan.steps[-1].held_out) else None,
            seconds=plan.environment.seconds,
        )
        for (metric, strategy), plan in zip(entries, plans, strict=True)
    ]
    number = min(range(len(plans)), key=lambda n: compared[n].held_out_perplexity or compared[n].perplexity)
    best = plans[number]
    result = CompareResult(
        schema_version=1,
        sleb_version=__version__,
        kind="compare",
        model=best.model,
        calibration=best.calibration,
        dtype=best.search.dtype,
        device=best.search.device,
        dense_perplexity=best.dense.perplexity,
        dense_held_out_perplexity=best.dense.held_out.perplexity if best.dense.held_out else None,
        compared=tuple(compared),
        best="@".join(entries[number]),
    )
    return result, best


def resolve_compared(
    request: SearchRequest,
    entries: Sequence[tuple[str, StrategyName]],
    registry: Registry,
    notify: Notify,
    group: ProcessGroup,
) -> list[ResolvedSearch]:
    """Check the search of each entry."""
    requests = [_request_for(request, metric, strategy, registry) for metric, strategy in entries]
    if group.is_main:
        # An unfinished comparison was allowed to write the plan, and may have been killed just after it did.
        replaces = request.resume and any(journal_of(each.plan_file).exists() for each in requests)
        require_new_file(request.plan_file, force=request.force or replaces)
    return [resolve_search(each, registry, notify, group) for each in requests]


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
            "--compare compares metrics at the same size, and a loss or a speedup does not fix the size.",
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


def _request_for(request: SearchRequest, metric: str, strategy: StrategyName, registry: Registry) -> SearchRequest:
    """Return the request for one search, with `--fast` only where candidates can race."""
    return replace(
        request,
        metric=metric,
        strategy=strategy,
        fast=request.fast if can_race(registry.metric(metric), strategy) else False,
        output=_plan_path(request.plan_file, metric, strategy),
        compare=(),
    )


def _plan_path(output: Path, metric: str, strategy: str) -> Path:
    """Return the plan path that names the journal of one search; no plan is written there."""
    name = re.sub(r"[^\w.+@-]", "-", f"{metric}@{strategy}")
    return output.parent / f"{output.name}.{name}"


def delete_journals(result: CompareResult, output: Path, notify: Notify) -> None:
    """Delete the journals of all compared searches."""
    for compared in result.compared:
        delete_journal(journal_of(_plan_path(output, compared.metric, compared.strategy)), notify)


def _each_notice_once(notify: Notify) -> Notify:
    """Forward events, but each notice only once: every search repeats those about the model."""
    once = cache(notify)
    return lambda event: once(event) if isinstance(event, Notice) else notify(event)
