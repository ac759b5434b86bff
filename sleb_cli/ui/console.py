"""Where does output go? Results to stdout, everything else to stderr."""

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

    Output is then discarded (`is_gone`), and work continues, since its result may go to a file. Any
    other error is raised only on the stream that holds the result.
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
            # Python flushes the buffer again at exit, and libraries keep printing: let that reach
            # /dev/null.
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)
            if error.errno in (errno.EPIPE, errno.EIO):
                self.is_gone = True
            elif self._holds_result:
                raise OutputError(
                    f"Cannot write the result to stdout: {error.strerror}.",
                    hint="Free some space, or redirect stdout elsewhere.",
                ) from error


# Model cards and file names come from strangers: a control character could rewrite the screen, and
# an override of the writing direction could disguise a name. Tab and newline are harmless.
_UNSAFE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class InertConsole(Console):
    """A console that shows control characters as escapes."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render with control characters escaped."""
        for segment in super().render(renderable, options):
            # A control segment holds Rich's own codes.
            is_safe = segment.control or not _UNSAFE.search(segment.text)
            yield segment if is_safe else segment._replace(text=escape_controls(segment.text))


def escape_controls(text: str) -> str:
    """Replace control characters by escapes: \\x1b, \\u202e."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# A file name, or a library's message about one, can be as long as a file.
_MAX_MESSAGE_CHARACTERS = 2000
_IN_ASCII = {
    "…": "...", "·": ".", "×": "x", "█": "#", "○": "o", "●": "*", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "✓": "v",
    "Δ": "d", **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),
}  # fmt: skip


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    substitutes = (
        _IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in missing
    )
    return "".join(substitutes), error.end


def support_any_encoding() -> None:
    """Make every character printable on streams that are not UTF-8."""
    codecs.register_error("sleb", _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not _is_utf8(stream):
            stream.reconfigure(errors="sleb")


def _is_utf8(stream: Any) -> bool:
    return str(getattr(stream, "encoding", None)).lower().replace("-", "") == "utf8"


def stdout() -> Console:
    """Return a console on the current stdout, quiet in all but the main process."""
    return InertConsole(highlight=False, emoji=False, quiet=not is_main_process())


def stderr() -> Console:
    """Return a console on the current stderr, quiet in all but the main process."""
    # With `stderr=True`, Rich looks sys.stderr up at each print, so silencing a library would
    # silence our bars.
    return InertConsole(file=sys.stderr, highlight=False, emoji=False, quiet=not is_main_process())


def print_prose(console: Console, text: str) -> None:
    """Print sentences with markup, wrapped between words on a terminal only."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_json(data: Mapping[str, Any]) -> None:
    """Print only JSON on stdout, unwrapped and uncoloured, in the main process."""
    if is_main_process():
        print(json.dumps(data, ensure_ascii=not _is_utf8(sys.stdout), allow_nan=False))


def print_error(error: SlebError) -> None:
    """Print what happened, and what to do about it."""
    console = stderr()
    # Our sentences have no newline, but a file name may.
    message = elide(error.message.replace("\n", "\\n"), _MAX_MESSAGE_CHARACTERS)
    # Not wrapped, so that paths and commands can be copied.
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    console.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warning(text: str, console: Console | None = None) -> None:
    """Print a warning on stderr, by way of `console` if it draws bars there."""
    print_prose(console or stderr(), f"[bold yellow]warning:[/] {escape(text)}")
