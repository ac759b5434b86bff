"""The two consoles: results go to stdout, everything else to stderr."""

import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from sleb_cli.names import elide
from sleb_cli.processes import is_main_process
from sleb_plugins import SlebError


class Outlet:
    """A standard stream that outlives its reader, such as a closed terminal or `| head -1`.

    Output is then discarded (`is_gone`), and work continues, since its result may go to a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or discard it if the reader has gone."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        """Write buffered text."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        self.is_gone = True
        # Python flushes the buffer again at exit, and libraries keep printing: let that reach
        # /dev/null.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())
        os.close(devnull)


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
            if segment.control:  # it holds Rich's own codes
                yield segment
            else:
                yield segment._replace(text=escape_controls(segment.text))


def escape_controls(text: str) -> str:
    """Replace control characters by escapes: \\x1b, \\u202e."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# A file name, or a library's message about one, can be as long as a file.
_MAX_MESSAGE_CHARACTERS = 2000


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream takes every character."""
    return str(stream.encoding).lower() == "utf-8"


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
        print(json.dumps(data, ensure_ascii=not is_utf8(sys.stdout), allow_nan=False))


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
