"""The sections of a report, in their order."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import Plot
from sleb_cli.exporters.report.pictures import (
    distance_plot,
    perplexity_plot,
    search_plot,
    speed_plot,
    tasks_plot,
    trade_plot,
)
from sleb_cli.plan import SampleGeneration
from sleb_cli.tables import provenance, quality, search_results, speed
from sleb_cli.tables.table import Table


@dataclass(frozen=True)
class Section:
    """A picture, tables and a sample under a heading; `name` is its anchor."""

    name: str
    title: str
    plot: Plot | None = None
    tables: Sequence[Table] = ()
    sample: SampleGeneration | None = None


def sections(findings: Findings) -> list[Section]:
    """Return the sections that have content, the most important first."""
    plan = findings.plan
    search_tables = [search_results.search(plan)]
    settings = [provenance.search_settings(plan)]
    costs: list[Table] = []
    gains: list[Table] = []
    recovered: list[Table] = []
    if findings.evaluation:
        costs = quality.evaluation_tables(findings.evaluation, findings.text_names)
        settings.append(provenance.result_settings(findings.evaluation))
    if findings.benchmark:
        gains = speed.benchmark_tables(findings.benchmark)
        settings.append(provenance.result_settings(findings.benchmark))
    if plan.recovery:
        recovered = [search_results.recovery(plan.recovery, plan.model.output)]
    cost_plot = perplexity_plot(findings) or distance_plot(plan)
    candidates = [
        Section("trade", "Quality against speed", trade_plot(findings)),
        Section("kept", "What is kept", tasks_plot(findings)),
        Section("quality", "What it costs", cost_plot, costs),
        Section("speed", "What it gains", speed_plot(findings), gains),
        Section("said", "What both models say", sample=plan.sample_generation),
        Section("search", f"How the {plan.unit} were found", search_plot(plan), search_tables),
        Section("recovery", "What recovery gave back", tables=recovered),
        Section("settings", "Settings", tables=settings),
    ]
    shown = []
    for section in candidates:
        if section.plot or section.sample or any(table.rows for table in section.tables):
            shown.append(section)
    return shown
