"""The two streams: results go to stdout, everything else to stderr."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from sleb_cli.names import elide
from sleb_cli.processes import is_main_process
from sleb_plugins import OutputError, SlebError


class Outlet:
    """A standard stream that outlives its reader, such as a closed terminal or `| head -1`.

    Then output is discarded and work continues, since its result may go to a file. Other errors matter only on the
    stream that holds the result.

    Attributes:
        is_gone: whether the reader has gone.
    """

    def __init__(self, stream: TextIO, *, holds_result: bool) -> None:
        self._stream, self._holds_result = stream, holds_result
        self.is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or discard it if the reader has gone."""
        with self._discarding():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write buffered text."""
        with self._discarding():
            self._stream.flush()

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # From here on, the stream leads to nothing, so that neither its buffer nor a library fails again.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
            if error.errno in (errno.EPIPE, errno.EIO):
                self.is_gone = True
            elif self._holds_result:
                raise OutputError(
                    f"Cannot write the result to stdout: {error.strerror}.",
                    hint="Free some space, or redirect stdout elsewhere.",
                ) from error


# What a terminal obeys rather than shows: control characters but tab and newline, halves of surrogate pairs, and what
# turns the direction of writing. Files that others wrote may hold them.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InertConsole(Console):
    """A console that shows control characters as escapes, so that a terminal does not obey them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with control characters escaped."""
        for segment in super().render(renderable, options):
            inert = segment.control or not _OBEYED.search(segment.text)
            yield segment if inert else segment._replace(text=inert_text(segment.text))


def inert_text(text: str) -> str:
    """Return a text with control characters as escapes: \\x1b, \\u202e."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# A name, or what a library says of it, may be as long as a file.
_LONGEST = 2000
_IN_ASCII = {
    "…": "...", "·": ".", "×": "x", "█": "#", "○": "o", "●": "*", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "✓": "v",
    "Δ": "d", **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),
}  # fmt: skip


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks: ours by what looks alike, and those of names by escapes."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    alike = (_IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lacking)
    return "".join(alike), error.end


def speak_any_encoding() -> None:
    """Make every character printable on streams that are not UTF-8."""
    codecs.register_error("sleb", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not _is_utf8(stream):
            stream.reconfigure(errors="sleb")


def _is_utf8(stream: Any) -> bool:
    return str(getattr(stream, "encoding", None)).lower().replace("-", "") == "utf8"


def stdout() -> Console:
    """Return a console on the current stdout, quiet in all but the main process. Rich honours NO_COLOR."""
    return InertConsole(highlight=False, emoji=False, quiet=not is_main_process())


def stderr() -> Console:
    """Return a console on the current stderr, quiet in all but the main process."""
    # The stream itself, so that redirecting stderr around a library call does not redirect our bars.
    return InertConsole(file=sys.stderr, highlight=False, emoji=False, quiet=not is_main_process())


def print_prose(console: Console, text: str) -> None:
    """Print sentences with markup; a terminal, but no file, gets them wrapped between words."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_json(data: Mapping[str, Any]) -> None:
    """Print only JSON on stdout, unwrapped and uncoloured, in the main process."""
    if is_main_process():
        print(json.dumps(data, ensure_ascii=not _is_utf8(sys.stdout), allow_nan=False))


def print_error(error: SlebError) -> None:
    """Print what happened, and what to do about it."""
    # Not wrapped, since paths and commands in them may be copied.
    console = stderr()
    message = elide(error.message.replace("\n", "\\n"), _LONGEST)  # the newline of a name: a sentence has none
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    console.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warning(text: str, console: Console | None = None) -> None:
    """Print something the user should know though the command continues, on stderr or a console that draws there."""
    print_prose(console or stderr(), f"[bold yellow]warning:[/] {escape(text)}")
