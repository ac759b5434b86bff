"""Show the result of `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_cli.ui.tables import print_to_copy, show_table

if TYPE_CHECKING:
    from sleb_cli.results import DryRunResult


def show_dry_run(result: DryRunResult) -> None:
    """Show what a command would do, and the files that it would write."""
    from sleb_cli.tables.settings import dry_run  # pydantic, so here

    show_table(dry_run(result))
    for file in result.files or ["no file"]:
        print_to_copy(f"would write {file}")
