"""The two streams: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from sleb_plugins import SlebError


def stdout() -> Console:
    """Give a console on stdout as it is now; NO_COLOR is honoured by Rich."""
    return Console(highlight=False)


def stderr() -> Console:
    """Give a console on stderr as it is now."""
    return Console(stderr=True, highlight=False)


def print_json(data: Mapping[str, Any]) -> None:
    """Print nothing but JSON on stdout, unwrapped and uncoloured."""
    print(json.dumps(data, ensure_ascii=False, allow_nan=False))


def print_error(error: SlebError) -> None:
    """Print what happened, and what to do about it."""
    console = stderr()
    console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warning(text: str) -> None:
    """Print something the user should know though the command goes on."""
    stderr().print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def print_note(text: str) -> None:
    """Print a plain sentence on stderr."""
    stderr().print(escape(text), soft_wrap=True)
