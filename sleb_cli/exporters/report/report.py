"""Export a report: one page that needs no network and no script, for people who decide and people who check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sleb_cli.exporters.findings import Estimate, Findings, gap_lines, of_size, perplexity_change, workload_label
from sleb_cli.exporters.headline import between, sentences, speedup, warnings
from sleb_cli.exporters.report.drawing import NARROW, WIDE, Inlined, missing_extra, need_matplotlib
from sleb_cli.exporters.report.sections import plots_of, sections
from sleb_cli.units import format_change, format_count, format_perplexity, format_share, plural
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning

# What only other programs want to know of each item, window or run; a report would be many megabytes with it.
_LEFT_OUT = frozenset({"items", "doc_ids", "losses", "flips", "itls", "ttfts", "joules"})
_LEFT_OUT_OF_LARGE = _LEFT_OUT | {"scores", "race", "e2els"}
_LARGE = 150_000


class Report(FileExporter):
    """A page about a plan and what was measured of it."""

    name = "report"
    description = "a page about a plan: what it costs, what it gains, how it was found"
    needs_model = False

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the page.

        Raises:
            MachineError: the extra `report` is not installed.
        """
        findings = Findings(pruning)
        page = render_report(findings)
        file = writer.write_file(page.encode(), output, ".report.html")
        return [*gap_lines(pruning), f"look at it: {file.resolve().as_uri()}"]


def render_report(findings: Findings) -> str:
    """Return the page as HTML.

    Raises:
        MachineError: the extra `report` is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        missing_extra("jinja2", error)
    need_matplotlib()
    place = files("sleb_cli.exporters.report")
    texts = {name: (place / name).read_text(encoding="utf-8") for name in ("page.html.j2", "style.css", "script.js")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": texts["page.html.j2"]}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = typeset
    parts, inlined = sections(findings), Inlined()
    pictures = {
        (plot.name, width): inlined.svg(plot, width, title_id=f"{plot.name}-title")
        for plot in plots_of(parts)
        for width in (WIDE, NARROW)
    }
    page: str = environment.get_template("page").render(
        findings=findings,
        cards=cards(findings),
        sentences=sentences(findings),
        warnings=warnings(findings),
        sections=parts,
        pictures=pictures,
        style=texts["style.css"] + inlined.css,
        script=texts["script.js"],
        wide=WIDE,
        narrow=NARROW,
        data=embedded(findings.pruning),
    )
    return page


def typeset(text: str) -> str:
    """Return numbers as printers set them: with a minus sign, and never parted from their per cent."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text).replace(" %", "\N{NO-BREAK SPACE}%")


def cards(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the few numbers to remember: what, how much, and beside what."""
    kept = findings.blocks - len(findings.removals)
    found = [("blocks", f"{kept} of {findings.blocks}", f"{len(findings.removals)} removed")]
    dense, pruned = findings.size(()), findings.size(findings.removals)
    if dense and pruned:
        change = pruned["parameters"] / dense["parameters"] - 1
        found.append(("parameters", format_count(pruned["parameters"]), format_share(change, signed=True)))
    for result in findings.main_workloads:
        if entry := of_size(result, findings.removals):
            measured = speedup(entry)
            name = f"{workload_label(result['workload'])}, times as fast"
            found.append((name, f"{measured.value:.2f}×", between(measured) or plural(len(entry["e2els"]), "run")))
    for text in findings.texts[:2]:
        if entry := of_size(text, findings.removals):
            change = perplexity_change(entry)
            name = f"perplexity, {findings.text_name(text)}"
            both = f"{format_perplexity(text['dense']['perplexity'])} → {format_perplexity(entry['perplexity'])}"
            found.append((name, format_change(change.value), both))
    if value := findings.retention(findings.removals):
        found.append(("accuracy kept", format_share(value.value), _between(value)))
    return found


def _between(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{format_share(value.low)} to {format_share(value.high)}"


def embedded(pruning: Pruning) -> str:
    """Return the data behind the page as JSON that no text in it can leave: "</script>" has no "<" there."""
    data = {"plan": pruning.plan, "evaluation": pruning.evaluation, "benchmark": pruning.benchmark}
    text = _compact(_without(data, _LEFT_OUT))
    if len(text) > _LARGE:
        text = _compact(_without(data, _LEFT_OUT_OF_LARGE))
    escapes: dict[str, str | int | None] = {
        "<": "\\u003c",
        ">": "\\u003e",
        "&": "\\u0026",
        "\u2028": "\\u2028",
        "\u2029": "\\u2029",
    }
    return text.translate(str.maketrans(escapes))


def _compact(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _without(data: Any, names: frozenset[str]) -> Any:
    """Return data without what has these names, at every depth."""
    if isinstance(data, Mapping):
        return {name: _without(value, names) for name, value in data.items() if name not in names}
    return [_without(value, names) for value in data] if isinstance(data, list | tuple) else data
