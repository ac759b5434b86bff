"""`main()`: the one place that turns a `SlebError` into a sentence and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

import typer

from sleb_cli.processes import WorkerFinished, is_main_process, process_count
from sleb_cli.requests import require_text
from sleb_plugins import OutputError, SlebError, UsageError
from sleb_plugins.errors import without_secrets

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13
MAX_NAME_CHARACTERS = 60
UNREACHABLE = {
    errno.ENAMETOOLONG: ("the name is too long for a file", "Use a shorter one."),
    **dict.fromkeys(
        [errno.EACCES, errno.EPERM], ("you have no access to its folder", "Check its permissions.")
    ),
    **dict.fromkeys(
        [errno.EIO, errno.ESTALE, errno.ENOTCONN], ("the disk fails or is gone", "Check the disk.")
    ),
}
"""The reason and the hint for each error of a file that cannot even be looked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sleb` and return its exit code; any error but a `SlebError` is a bug and keeps its
    traceback.
    """
    from sleb_cli.app import app
    from sleb_cli.synonyms import hint_for
    from sleb_cli.ui import console

    console.support_any_encoding()
    try:
        _require_names(sys.argv[1:] if arguments is None else arguments)
        code = app(args=arguments, prog_name="sleb", standalone_mode=False)
        sys.stdout.flush()
    except WorkerFinished as finished:
        return finished.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "sleb"
        words, option = (
            list(sys.argv[1:] if arguments is None else arguments),
            getattr(error, "option_name", None),
        )
        message = error.format_message()
        known = hint_for(
            command, message, option, words
        )  # which is better than what Typer calls possible
        message = message.partition(" (Possible")[0] if known else message
        console.print_error(UsageError(message, hint=known or f"See `{command} --help`."))
        # All processes read the same command line, and a launcher would end the main one before it
        # has spoken.
        return UsageError.exit_code if is_main_process() else 0
    except (SlebError, OSError) as error:
        return _report(error)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        console.print_warning("Interrupted. No half-written files were left behind.")
    return code if isinstance(code, int) else 0


def _report(error: SlebError | OSError) -> int:
    """Print an error and return its exit code; raise a system error that is not about a file of the
    user's.
    """
    from sleb_cli.names import elide
    from sleb_cli.ui import console

    if isinstance(error, OSError):
        if error.filename is None or error.errno not in UNREACHABLE:
            raise error
        why, hint = UNREACHABLE[error.errno]
        error = UsageError(
            f"{elide(str(error.filename), MAX_NAME_CHARACTERS)} cannot be used: {why}.", hint=hint
        )
    if isinstance(error, OutputError) and error.unsaved is not None:
        with suppress(OutputError):  # stdout may be on the same full disk
            console.print_json(error.unsaved)
            sys.stdout.flush()
            console.print_warning(
                "The result could not be saved; it was printed on stdout as JSON."
            )
    console.print_error(error)
    return error.exit_code


def _require_names(arguments: Sequence[str]) -> None:
    # Plans and results are UTF-8: the name of a folder that is not text could not be stored after
    # hours of work.
    try:
        here = str(Path.cwd())
    except FileNotFoundError as error:
        raise UsageError(
            "The current folder has been deleted.", hint="Change to another folder."
        ) from error
    for name in (here, *arguments):
        require_text(name)


def run() -> None:
    """Run as the program `sleb`: signals clean up like Ctrl-C, and work goes on after a pipe is
    closed.
    """
    from sleb_cli.ui.console import Outlet

    codes: list[int] = []
    atexit.register(_exit_fast, codes)  # registered first, so it is called last
    _open_standard_streams()
    out, errors = Outlet(sys.stdout, holds_result=True), Outlet(sys.stderr, holds_result=False)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, errors)
    _handle_signals()
    try:
        code = main()
    except KeyboardInterrupt:  # once more, while the first one was being reported
        code = INTERRUPTED
    # A bug: people post its traceback, so it must hold no tokens. Not by excepthook, which Typer
    # resets.
    except Exception:
        errors.write(without_secrets(traceback.format_exc()))
        code = 1
    finally:
        errors.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to clean up
    codes.append(BROKEN_PIPE if out.is_gone and not code else code)
    sys.exit(codes[0])


def _exit_fast(codes: list[int]) -> None:
    # All threads and exit handlers are done, and Python would take a second to tear torch down.
    # Without a code, a signal ends the process, and Python knows its code.
    if codes:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(codes[0])


def _open_standard_streams() -> None:
    # The next file we open would take the number of a closed stream, and libraries would print into
    # it.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # the lowest free number is then its own
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)


def _handle_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # The shell has a job in the background, or under nohup, ignore a signal; it stays ignored.
        if number and (process_count() > 1 or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, _end)


def _end(number: int, frame: Any) -> None:
    """End with a clean-up that only a second Ctrl-C interrupts; the next run removes what that
    leaves.
    """
    # Of several processes, each gets two: from the terminal and from the launcher.
    at_once = number == signal.SIGINT and process_count() == 1
    signal.signal(number, signal.SIG_DFL if at_once else signal.SIG_IGN)
    if at_once and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # the bars hide the cursor, and could not show it again
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


if __name__ == "__main__":
    run()
