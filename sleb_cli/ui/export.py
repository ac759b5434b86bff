"""Show the result of `sleb export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.ui.apply import show_applied
from sleb_cli.ui.console import inert_text
from sleb_cli.ui.tables import print_to_copy, print_written

if TYPE_CHECKING:
    from sleb_cli.results import ExportResult


def show_exported(exported: ExportResult, output: Path | None) -> None:
    """Print a text, in which nothing is obeyed by a terminal, or show what was written and how far it is proven."""
    if exported.text is not None:
        if output is None:
            print(inert_text(exported.text), end="")
        else:
            print_written(output)
    for result in exported.written:
        show_applied(result)
    for file in exported.files:
        print_written(Path(file))
    for line in exported.lines:
        print_to_copy(line)
