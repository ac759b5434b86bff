"""The two streams: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sleb_cli.processes import is_main_process
from sleb_plugins import SlebError

if TYPE_CHECKING:
    from sleb_cli.records import Record


def stdout() -> Console:
    """Return a console on the current stdout, quiet in all but the main process. Rich honours NO_COLOR."""
    return Console(highlight=False, emoji=False, quiet=not is_main_process())


def stderr() -> Console:
    """Return a console on the current stderr, quiet in all but the main process."""
    # The stream itself, so that redirecting stderr around a library call does not redirect our bars.
    return Console(file=sys.stderr, highlight=False, emoji=False, quiet=not is_main_process())


def print_prose(console: Console, text: str) -> None:
    """Print sentences with markup; a terminal, but no file, gets them wrapped between words."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_json(data: Mapping[str, Any]) -> None:
    """Print only JSON on stdout, unwrapped and uncoloured, in the main process."""
    if is_main_process():
        print(json.dumps(data, ensure_ascii=False, allow_nan=False))


def print_error(error: SlebError) -> None:
    """Print what happened, and what to do about it."""
    # Not wrapped, since paths and commands in them may be copied.
    console = stderr()
    console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    console.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warning(text: str, console: Console | None = None) -> None:
    """Print something the user should know though the command continues, on stderr or a console that draws there."""
    print_prose(console or stderr(), f"[bold yellow]warning:[/] {escape(text)}")


def print_note(text: str) -> None:
    """Print a plain sentence on stderr."""
    stderr().print(escape(text), soft_wrap=True)


def show(record: Record, table: Callable[[], None], *, as_json: bool) -> None:
    """Print a result on stdout: as JSON, or as its command's table."""
    if as_json:
        print_json(record.to_data())
    else:
        table()
