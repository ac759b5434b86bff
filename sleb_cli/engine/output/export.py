"""`sleb export`: the removals in another tool's notation, or as a page."""

from __future__ import annotations

from pathlib import Path

from sleb_cli.atomic import write_text
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import ExportResult
from sleb_plugins import Exporter, Pruning


def export_text(exporter: Exporter, pruning: Pruning, output: Path | None, *, replace: bool) -> ExportResult:
    """Return the text of a format, or write it to a file.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    text = exporter.export(pruning)
    if output is not None:
        write_text(output, text, replace=replace)
    return ExportResult(
        **THIS_VERSION,
        kind="export",
        exporter=exporter.name,
        text=text if output is None else None,
        file=None if output is None else str(output),
    )
