"""The sections of a report, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import Plot
from sleb_cli.exporters.report.pictures import perplexity_plot, search_plot, speed_plot, trade_plot
from sleb_cli.plan import Plan, SampleGeneration
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

    @property
    def has_content(self) -> bool:
        """Whether there is anything below the heading."""
        return bool(self.plot or self.sample or any(table.rows for table in self.tables))


def sections(findings: Findings) -> list[Section]:
    """Return the sections that have content, the most important first."""
    plan = findings.plan
    candidates = [
        Section("trade", "Quality against speed", trade_plot(findings)),
        Section("quality", "What it costs", perplexity_plot(findings), _costs(findings)),
        Section("speed", "What it gains", speed_plot(findings), _gains(findings)),
        Section("said", "What both models say", sample=plan.sample_generation),
        Section("search", f"How the {plan.unit} were found", search_plot(plan), _search(plan)),
        Section("recovery", "What recovery gave back", tables=_recovery(plan)),
        Section("settings", "Settings", tables=_settings(findings)),
    ]
    return [section for section in candidates if section.has_content]


def _costs(findings: Findings) -> list[Table]:
    if findings.evaluation is None:
        return []
    return quality.evaluation_tables(findings.evaluation, findings.text_names)


def _gains(findings: Findings) -> list[Table]:
    return speed.benchmark_tables(findings.benchmark) if findings.benchmark else []


def _search(plan: Plan) -> list[Table]:
    return [search_results.search(plan)]


def _recovery(plan: Plan) -> list[Table]:
    return [search_results.recovery(plan.recovery)] if plan.recovery else []


def _settings(findings: Findings) -> list[Table]:
    tables = [provenance.search_settings(findings.plan)]
    if findings.evaluation:
        tables.append(provenance.result_settings(findings.evaluation))
    if findings.benchmark:
        tables.append(provenance.result_settings(findings.benchmark))
    return tables
