"""`sleb search --compare`: one search per metric, with one loaded model and calibration text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.inputs import load_inputs
from sleb_cli.engine.search.run import run_search
from sleb_cli.engine.search.settings import Search
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import Plan
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import ComparedRecord, CompareResult


def compare_removals(
    searches: Sequence[Search], file: Path, group: ProcessGroup, notify: Notify
) -> tuple[CompareResult, list[Plan]]:
    """Run each search, and return their comparison and the plans, of which the best belongs in
    `file`.

    It has the lowest perplexity, on held-out sequences if there are any. Each search keeps its own
    journal; delete them once the plans are written.
    """
    inputs = load_inputs(searches[0], group, notify)
    plans: list[Plan] = []
    for number, search in enumerate(searches, start=1):
        notify(Notice(f"{number} of {len(searches)}: {_name(search)}"))
        # each search takes a share of the free memory, where the last one's hidden states still are
        free_memory()
        plans.append(run_search(search, inputs, time.monotonic()))
    number = min(
        range(len(plans)), key=lambda n: plans[n].held_out_perplexity or plans[n].perplexity
    )
    best = plans[number]
    files = [
        file if plan is best else search.recording.plan_file
        for search, plan in zip(searches, plans, strict=True)
    ]
    result = CompareResult(
        **THIS_VERSION,
        kind="compare",
        unit=best.unit,
        model=best.model,
        calibration=best.calibration,
        dtype=best.search.dtype,
        device=best.search.device,
        dense_perplexity=best.dense.perplexity,
        dense_held_out_perplexity=best.dense.held_out.perplexity if best.dense.held_out else None,
        compared=tuple(map(_compared, searches, plans, files)),
        best=_name(searches[number]),
    )
    return result, plans


def _compared(search: Search, plan: Plan, file: Path) -> ComparedRecord:
    return ComparedRecord(
        metric=str(search.recording.options["metric"]),
        strategy=search.method.strategy_name,
        removals=plan.largest,
        perplexity=plan.perplexity,
        held_out_perplexity=plan.held_out_perplexity,
        seconds=plan.environment.seconds,
        file=str(file),
    )


def _name(search: Search) -> str:
    return f"{search.recording.options['metric']}@{search.method.strategy_name}"
