"""Export a report: one page that needs no network and no script, for people who decide and people who check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sleb_cli.exporters.findings import Findings, gap_lines, read_findings
from sleb_cli.exporters.headline import sentences, warnings
from sleb_cli.exporters.report.drawing import need_extra, picture
from sleb_cli.exporters.report.sections import flips, plots_of, sections
from sleb_cli.exporters.reproduce import commands, on_lines
from sleb_cli.tables.quality import perplexity_change
from sleb_cli.tables.search import said
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import between
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
        need_extra()
        page = _render(read_findings(pruning), pruning)
        file = writer.write_file(page.encode(), output, ".report.html")
        return [*gap_lines(pruning), f"look at it: {file.resolve().as_uri()}"]


class Figures(FileExporter):
    """A folder with every picture of the report as SVG and PNG, for papers and slides."""

    name = "figures"
    description = "the report's pictures, as SVG and PNG"
    needs_model = False

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder.

        Raises:
            MachineError: the extra `report` is not installed.
        """
        need_extra()
        plots = plots_of(sections(read_findings(pruning)))
        pictures = {f"{plot.name}.{kind}": picture(plot, kind) for plot in plots for kind in ("svg", "png")}
        writer.write_folder(pictures, output, ".figures")
        return [f"{plural(len(plots), 'picture')}: {', '.join(plot.name for plot in plots)}", *gap_lines(pruning)]


def _render(findings: Findings, pruning: Pruning) -> str:
    import jinja2

    place = files("sleb_cli.exporters.report")
    texts = {name: (place / name).read_text(encoding="utf-8") for name in ("page.html.j2", "style.css", "script.js")}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["typeset"] = typeset
    parts, sample = sections(findings), findings.plan.sample_generation
    page: str = environment.from_string(texts["page.html.j2"]).render(
        plan=findings.plan,
        findings=findings,
        cards=cards(findings),
        sentences=sentences(findings),
        warnings=warnings(findings),
        sections=parts,
        # Shorter than in base64; what has a meaning in an attribute or an address is escaped.
        pictures={plot.name: quote(picture(plot, "svg"), safe=" !$()*+,/:;=?@[]^{|}~") for plot in plots_of(parts)},
        said=said(sample) if sample else [],
        flips=flips(findings),
        commands="\n".join(map(on_lines, commands(findings))),
        style=texts["style.css"],
        script=texts["script.js"],
        data=embedded(pruning),
    )
    return page


def typeset(text: str) -> str:
    """Return numbers as printers set them: with a minus sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def cards(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the few numbers to remember: what, how much, and beside what."""
    count, blocks = len(findings.plan.removals), findings.plan.model.blocks
    found = [("blocks", f"{blocks - count} of {blocks}", f"{count} removed")]
    if findings.sizes:
        dense, pruned = (size.parameters for size in findings.sizes)
        found.append(("parameters", format_count(pruned), format_share(pruned / dense - 1, signed=True)))
    for result, timing in findings.main_workloads:
        ends = between(timing.interval, "{:.2f}".format) or plural(len(timing.e2els), "run")
        found.append((f"{workload_name(result)}, times as fast", f"{timing.speedup:.2f}×", ends))
    for name, text, scores in findings.own_texts[:2]:
        both = f"{format_perplexity(text.dense.perplexity)} → {format_perplexity(scores.perplexity)}"
        found.append((f"perplexity, {name}", format_change(perplexity_change(scores)[0]), both))
    if kept := findings.retention(findings.plan.removals):
        found.append(("accuracy kept", format_share(kept[0]), between(kept[1], format_share)))
    return found


def embedded(pruning: Pruning) -> str:
    """Return the data behind the page as JSON that no text in it can leave: "</script>" has no "<" there."""
    data = {"plan": pruning.plan, "evaluation": pruning.evaluation, "benchmark": pruning.benchmark}
    for left_out in (_LEFT_OUT, _LEFT_OUT_OF_LARGE):
        text = json.dumps(_without(data, left_out), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if len(text) <= _LARGE:
            break
    return text.translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


def _without(data: Any, names: frozenset[str]) -> Any:
    """Return data without what has these names, at every depth."""
    if isinstance(data, Mapping):
        return {name: _without(value, names) for name, value in data.items() if name not in names}
    return [_without(value, names) for value in data] if isinstance(data, list | tuple) else data
