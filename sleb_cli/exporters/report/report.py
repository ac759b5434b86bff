"""Export a report: one HTML page that needs no network and no script."""

from functools import partial
from urllib.parse import quote

from sleb_cli.exporters.findings import Findings, read_comparison, read_findings
from sleb_cli.exporters.headline import every_size, sentences, verdicts, warnings
from sleb_cli.exporters.report.drawing import NARROW, WIDTH, Plot, render, require_extra
from sleb_cli.exporters.report.sections import sections
from sleb_cli.tables.comparison import comparison_tables, conclusions
from sleb_cli.tables.quality import perplexity_change
from sleb_cli.tables.search_results import sample_rows
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
    compares = True

    def export(self, pruning: Pruning) -> str:
        """Return the page.

        Raises:
            MachineError: the extra `report` is not installed.
        """
        require_extra()
        import jinja2

        environment = jinja2.Environment(
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
            loader=jinja2.PackageLoader("sleb_cli.exporters.report", ""),
        )
        environment.filters["picture"] = _to_url
        environment.filters["narrow_picture"] = partial(_to_url, width=NARROW)
        comparison = read_comparison(pruning)
        if comparison:
            page: str = environment.get_template("comparison.html.j2").render(
                result=comparison,
                sentences=conclusions(comparison),
                tables=comparison_tables(comparison),
                file=pruning.plan_file,
            )
            return page
        findings = read_findings(pruning)
        sample = findings.plan.sample_generation
        text: str = environment.get_template("page.html.j2").render(
            plan=findings.plan,
            findings=findings,
            cards=cards(findings),
            sentences=verdicts(findings) + sentences(findings),
            every_size=every_size(findings),
            warnings=warnings(findings),
            sections=sections(findings),
            sample_rows=sample_rows(sample) if sample else [],
        )
        return text


def _to_url(plot: Plot, width: float = WIDTH) -> str:
    # As text in a data URL, an SVG is shorter than in base64. A list of images ends at a space.
    return quote(render(plot, width), safe="!$()*+,/:;=?@[]^{|}~")


def cards(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the headline numbers: name, value, and a note."""
    order = findings.plan.order
    count = len(findings.plan.largest)
    numbers = [(order.parts, f"{order.count - count} of {order.count}", f"{count} removed")]
    if findings.sizes:
        dense, pruned = findings.sizes
        change = pruned.parameters / dense.parameters - 1
        numbers.append(
            ("parameters", format_count(pruned.parameters), format_share(change, signed=True))
        )
    for result, timing in findings.main_workloads:
        note = between(timing.interval, "{:.2f}".format)
        if not note:
            note = f"{plural(len(timing.e2els), 'run')}, too few for an interval"
        numbers.append((f"{workload_name(result)}, times as fast", f"{timing.speedup:.2f}×", note))
    for name, text, scores in findings.text_scores[:2]:
        change, _ = perplexity_change(scores)
        before = format_perplexity(text.dense.perplexity)
        after = format_perplexity(scores.perplexity)
        numbers.append((f"perplexity, {name}", format_change(change), f"{before} → {after}"))
    share = findings.retention(findings.plan.largest)
    if share:
        kept_share, interval = share
        numbers.append(("accuracy kept", format_share(kept_share), between(interval, format_share)))
    return numbers
