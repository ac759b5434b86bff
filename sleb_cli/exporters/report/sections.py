"""What a report says, in order: sections of sentences, pictures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import Plot
from sleb_cli.exporters.report.quality_plots import pareto_plots, task_plots, text_plots
from sleb_cli.exporters.report.search_plots import search_plots
from sleb_cli.exporters.report.speed_plots import speed_plots
from sleb_cli.results import FlipRecord
from sleb_cli.tables import quality, settings, speed
from sleb_cli.tables.search import kinds, recovery
from sleb_cli.tables.table import Table

_MOST_FLIPS = 10
_HOW_SAID = (
    'At the end of the search, both continued the prompt greedily. "Repeated" is the share of runs of 4 tokens that '
    "occurred before."
)


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading: its pictures, each with its numbers, then sentences and other tables."""

    name: str
    title: str
    plots: Sequence[Plot] = ()
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()


def sections(findings: Findings) -> list[Section]:
    """Return the parts of a report, from what matters to most readers to what matters to few."""
    plan, depth = findings.plan, _by_depth(findings)
    results = [settings.result_settings(each) for each in (findings.evaluation, findings.benchmark) if each]
    cost, of_tasks = [quality.text_settings(findings.texts, findings.text_names)], [*task_plots(findings)]
    cost += [] if of_tasks else [quality.tasks(findings.scored_tasks)]
    gain = [speed.memory(findings.timed)]
    gain += [speed.sizes(findings.benchmark)] if findings.benchmark else []
    parts = [
        Section("trade", "Quality against speed", [*pareto_plots(findings)]),
        Section("quality", "What it costs", [*text_plots(findings), *of_tasks], tables=cost),
        Section("speed", "What it gains", [*speed_plots(findings)], tables=gain),
        Section("said", "What both models say", sentences=[_HOW_SAID] if plan.sample_generation else []),
        Section("search", "How the blocks were found", [*search_plots(plan)], depth, [kinds(plan)]),
        Section("recovery", "What recovery gave back", tables=[recovery(plan.recovery)] if plan.recovery else []),
        Section("settings", "Settings", tables=[settings.search_settings(plan), *results]),
    ]
    return [part for part in parts if part.plots or part.sentences or any(table.rows for table in part.tables)]


def plots_of(parts: Iterable[Section]) -> list[Plot]:
    """Return every picture of a report."""
    return [plot for part in parts for plot in part.plots]


def _by_depth(findings: Findings) -> list[str]:
    """Say how many blocks are gone of each third of the model."""
    blocks = findings.plan.model.blocks
    edges = [round(part * blocks / 3) for part in range(4)]
    gone = [
        f"{sum(low <= block < high for block in findings.plan.removals)} of {high - low} in the {name} third"
        for name, (low, high) in zip(("first", "middle", "last"), pairwise(edges), strict=True)
    ]
    return [f"Blocks removed by depth: {', '.join(gone)}."] if blocks >= 6 else []


def flips(findings: Findings) -> list[tuple[str, Sequence[FlipRecord]]]:
    """Return some items of each task that only one model gets right."""
    return [(task.task, entry.flips[:_MOST_FLIPS]) for task, entry in findings.main_tasks if entry.flips]
