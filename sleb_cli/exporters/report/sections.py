"""Which sections does a report have, in which order?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import Plot
from sleb_cli.exporters.report.pictures import perplexity_plot, search_plot, speed_plot, trade_plot
from sleb_cli.tables import provenance, quality, search_results, speed
from sleb_cli.tables.table import Table


@dataclass(frozen=True)
class Section:
    """A picture and tables under a heading; `name` is its anchor."""

    name: str
    title: str
    plot: Plot | None = None
    tables: Sequence[Table] = ()


def sections(findings: Findings) -> list[Section]:
    """Return the sections that have content, the most important first."""
    plan, benchmark = findings.plan, findings.benchmark
    texts, tasks, timed = findings.scored.values()
    cost = [quality.perplexities(texts), quality.divergences(texts), quality.tasks(tasks)]
    cost += [quality.verdicts(findings.tasks)]
    cost += [quality.text_settings(findings.texts, findings.text_names)]
    gain = [speed.speeds(timed, plan.order), speed.latencies(timed), speed.memory(timed)]
    gain += [speed.sizes(benchmark)] if benchmark else []
    results = [
        provenance.result_settings(result) for result in (findings.evaluation, benchmark) if result
    ]
    recovered = [search_results.recovery(plan.recovery)] if plan.recovery else []
    candidates = [
        Section("trade", "Quality against speed", trade_plot(findings)),
        Section("quality", "What it costs", perplexity_plot(findings), tables=cost),
        Section("speed", "What it gains", speed_plot(findings), tables=gain),
        *([Section("said", "What both models say")] if plan.sample_generation else []),
        Section(
            "search",
            f"How the {plan.unit} were found",
            search_plot(plan),
            tables=[search_results.search(plan)],
        ),
        Section("recovery", "What recovery gave back", tables=recovered),
        Section("settings", "Settings", tables=[provenance.search_settings(plan), *results]),
    ]
    return [
        section
        for section in candidates
        if section.name == "said" or section.plot or any(table.rows for table in section.tables)
    ]
