"""The two streams: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sleb_cli.atomic import write_text
from sleb_cli.processes import is_main_process
from sleb_plugins import Exporter, OutputError, Pruning, SlebError

if TYPE_CHECKING:
    from sleb_cli.records import Record


def stdout() -> Console:
    """Give a console on stdout as it is now, of which the main process alone makes use; Rich honours NO_COLOR."""
    return Console(highlight=False, quiet=not is_main_process())


def stderr() -> Console:
    """Give a console on stderr as it is now, of which the main process alone makes use."""
    # The stream itself, so that what the engine redirects for a library does not take our bars along.
    return Console(file=sys.stderr, highlight=False, quiet=not is_main_process())


def print_json(data: Mapping[str, Any]) -> None:
    """Print nothing but JSON on stdout, unwrapped and uncoloured."""
    print(json.dumps(data, ensure_ascii=False, allow_nan=False))


def print_error(error: SlebError) -> None:
    """Print what happened, and what to do about it."""
    console = stderr()
    console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    console.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warning(text: str) -> None:
    """Print something the user should know though the command goes on."""
    stderr().print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def print_note(text: str) -> None:
    """Print a plain sentence on stderr."""
    stderr().print(escape(text), soft_wrap=True)


def save(record: Record, path: Path) -> None:
    """Write a result; where that fails after all the work, print it on stdout, so that nothing is lost.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        record.write(path)
    except OutputError:
        print_json(record.to_data())
        print_warning("The result could not be saved, so it stands on stdout as JSON.")
        raise


def show_document(exporter: Exporter, pruning: Pruning, output: Path | None, *, as_json: bool) -> None:
    """Print an export on stdout exactly as it is, or write it to `output`."""
    text = json.dumps(exporter.document(pruning), ensure_ascii=False) + "\n" if as_json else exporter.render(pruning)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
        print_note(f"wrote {output}")
