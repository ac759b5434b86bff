"""Export a report: one page that needs no network and no script, for people who decide and people who check."""

from __future__ import annotations

from urllib.parse import quote

from sleb_cli.exporters.findings import Findings, read_findings
from sleb_cli.exporters.headline import advice, sentences, warnings
from sleb_cli.exporters.report.drawing import need_extra, picture
from sleb_cli.exporters.report.sections import sections
from sleb_cli.tables.quality import perplexity_change
from sleb_cli.tables.search_results import said
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import between
from sleb_cli.units import format_change, format_count, format_perplexity, format_share, plural
from sleb_plugins.exporter import Exporter, Pruning


class Report(Exporter):
    """A page about a plan and what was measured of it."""

    name = "report"
    description = "a page about a plan: what it costs, what it gains, how it was found"
    ending = ".report.html"
    needs_model = False

    def export(self, pruning: Pruning) -> str:
        """Return the page.

        Raises:
            MachineError: the extra `report` is not installed.
        """
        need_extra()
        import jinja2

        findings, own = read_findings(pruning), jinja2.PackageLoader("sleb_cli.exporters.report", "")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, loader=own
        )
        # Shorter than in base64; what has a meaning in an attribute or an address is escaped.
        environment.filters["picture"] = lambda plot: quote(picture(plot), safe=" !$()*+,/:;=?@[]^{|}~")
        sample = findings.plan.sample_generation
        text: str = environment.get_template("page.html.j2").render(
            plan=findings.plan,
            findings=findings,
            cards=cards(findings),
            sentences=[*sentences(findings), *advice(findings)],
            warnings=warnings(findings),
            sections=sections(findings),
            said=said(sample) if sample else [],
        )
        return text


def cards(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the few numbers to remember: what, how much, and beside what."""
    count, whole, parts = findings.removed
    found = [(parts, f"{whole - count} of {whole}", f"{count} removed")]
    if findings.sizes:
        dense, pruned = (size.parameters for size in findings.sizes)
        found.append(("parameters", format_count(pruned), format_share(pruned / dense - 1, signed=True)))
    for result, timing in findings.main_workloads:
        runs = plural(len(timing.e2els), "run")
        ends = between(timing.interval, "{:.2f}".format) or f"{runs}, too few for an interval"
        found.append((f"{workload_name(result)}, times as fast", f"{timing.speedup:.2f}×", ends))
    for name, text, scores in findings.own_texts[:2]:
        both = f"{format_perplexity(text.dense.perplexity)} → {format_perplexity(scores.perplexity)}"
        found.append((f"perplexity, {name}", format_change(perplexity_change(scores)[0]), both))
    if kept := findings.retention(findings.plan.largest):
        found.append(("accuracy kept", format_share(kept[0]), between(kept[1], format_share)))
    return found
