"""`sleb search --compare`: one search for each metric, on one model in memory and one calibration text."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sleb_cli import __version__
from sleb_cli.engine.search.journal import Journal, journal_of
from sleb_cli.engine.search.resolve import SearchRequest, resolve_search
from sleb_cli.engine.search.run import Shared, run_search
from sleb_cli.engine.search.strategies import STRATEGIES, strategy_name
from sleb_cli.events import Event, Notice, Notify
from sleb_cli.plan import Plan, StrategyName
from sleb_cli.plugin_manager import Registry
from sleb_cli.results import ComparedRecord, CompareResult
from sleb_plugins import LogitMetric, UsageError


@dataclass(frozen=True)
class Entry:
    """A metric and the strategy that it is searched with."""

    metric: str
    strategy: StrategyName

    def __str__(self) -> str:
        return f"{self.metric}@{self.strategy}"

    def place(self, output: Path) -> Path:
        """Give the place beside whose journal this entry keeps what it measures."""
        name = re.sub(r"[^\w.+@-]", "-", str(self))  # task:piqa
        return output.with_name(f"{output.name}.{name}")


def compare_removals(
    request: SearchRequest, compared: Sequence[str], registry: Registry, notify: Notify
) -> tuple[CompareResult, Plan]:
    """Search once with each of `compared` (METRIC or METRIC@STRATEGY) and give all results, and the best one's plan.

    The best is the one with the lowest loss on the held-out sequences, or where none are, on those searched on. Each
    keeps a journal of its own beside `request.output`; whoever writes the plan lets `forget_journals` delete them.

    Raises:
        UsageError: they name nothing that can be held against one another; said before any work.
    """
    once = _Once(notify)
    entries = parse_entries(request, compared)
    resolved = [resolve_search(_request_for(request, entry, registry), registry, once) for entry in entries]
    shared, found = Shared(), list[tuple[Entry, Plan, float]]()
    _, model, _ = shared.load(resolved[0], notify)
    model()  # not in the first search's time
    for number, (entry, search) in enumerate(zip(entries, resolved, strict=True), start=1):
        notify(Notice(f"{number} of {len(entries)}: {entry}"))
        started = time.monotonic()
        plan = run_search(search, shared, registry, once)
        found.append((entry, plan, time.monotonic() - started))
    best_entry, best, _ = min(found, key=lambda each: _standing(each[1]))
    result = CompareResult(
        schema_version=1,
        sleb_version=__version__,
        kind="compare",
        model=best.model,
        dtype=best.search.dtype,
        device=best.search.device,
        dense_perplexity=best.dense.perplexity,
        dense_held_out_perplexity=best.dense.held_out.perplexity if best.dense.held_out else None,
        compared=tuple(_record(entry, plan, seconds) for entry, plan, seconds in found),
        best=str(best_entry),
    )
    return result, best


def parse_entries(request: SearchRequest, compared: Sequence[str]) -> tuple[Entry, ...]:
    """Read what is to be compared.

    Raises:
        UsageError: a strategy is not known, an entry is named twice or alone, or the sizes would differ.
    """
    if request.metric is not None or request.extend is not None:
        given = "--metric" if request.metric is not None else "--extend"
        raise UsageError(
            f"--compare names the metrics of whole searches, so {given} does not go with it.", hint="Leave it out."
        )
    if request.target.chosen() not in ("ratio", "remove", "target_params", "target_memory"):
        raise UsageError(
            "--compare holds metrics against one another at one size, which a loss or a speedup does not set.",
            hint="Take --remove, --ratio, --target-params or --target-memory.",
        )
    usual = request.strategy or "greedy"
    entries = []
    for text in compared:
        metric, at, strategy = text.rpartition("@")
        entries.append(Entry(metric, strategy_name(strategy)) if at else Entry(text, strategy_name(usual)))
    if len(entries) < 2 or len(set(entries)) < len(entries):
        raise UsageError(
            f"--compare {','.join(compared)} names {'one twice' if len(entries) > 1 else 'nothing to compare with'}.",
            hint="Write it like nll,cosine,angular@contiguous.",
        )
    return tuple(entries)


def _request_for(request: SearchRequest, entry: Entry, registry: Registry) -> SearchRequest:
    """Give the request for one search; only those race whose candidates can."""
    races = isinstance(registry.metric(entry.metric), LogitMetric) and STRATEGIES[entry.strategy].races
    return replace(
        request,
        metric=entry.metric,
        strategy=entry.strategy,
        beam_width=request.beam_width if entry.strategy == "beam" else None,
        fast=request.fast and races,
        output=entry.place(request.output),
    )


def _standing(plan: Plan) -> float:
    """Give the perplexity that decides: on the held-out sequences, or where there are none, on those searched on."""
    step = plan.steps[-1]
    return step.held_out.perplexity if step.held_out else step.perplexity


def _record(entry: Entry, plan: Plan, seconds: float) -> ComparedRecord:
    held_out = plan.steps[-1].held_out
    return ComparedRecord(
        metric=entry.metric,
        strategy=entry.strategy,
        removals=plan.removals,
        perplexity=plan.steps[-1].perplexity,
        held_out_perplexity=held_out.perplexity if held_out else None,
        seconds=seconds,
    )


def forget_journals(result: CompareResult, output: Path) -> None:
    """Delete what the searches kept beside the plan that is written now."""
    for compared in result.compared:
        Journal(journal_of(Entry(compared.metric, strategy_name(compared.strategy)).place(output))).delete()


class _Once:
    """Hands events on, and each notice only once: every search would say the same of the model."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._said: set[Event] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self._said:
                return
            self._said.add(event)
        self._notify(event)
