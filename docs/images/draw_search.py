"""Draw docs/images/search.svg: run the README's first command in a terminal of 80 columns, and keep its last screen."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 80
COMMAND = ["sleb", "search", "demo", "--ratio", "0.2"]


def screen(command: list[str]) -> str:
    """Return what a command leaves on a terminal, with its colours: all after the bars were last drawn anew."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tempfile.mkdtemp())  # where no plan is overwritten
        os.environ.pop("COLUMNS", None)
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    output = bytearray()
    try:
        while part := os.read(terminal, 65536):
            output += part
    except OSError:  # how Linux says that the other side is closed
        pass
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(output.decode())
    return output.decode().replace("\r\n", "\n").rpartition("\x1b[2K")[2].replace("\x1b[?25h", "").rstrip()


def main() -> None:
    """Write the picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"$ {' '.join(COMMAND)}", highlight=False)
    console.print(Text.from_ansi(screen([*COMMAND, *sys.argv[1:]])))
    svg = console.export_svg(title="sleb search")
    Path(__file__).with_name("search.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
