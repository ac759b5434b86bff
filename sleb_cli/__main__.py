"""`main()`: the one place that turns a `SlebError` into a sentence and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast

import typer

from sleb_cli.processes import Terminated, WorkerFinished, is_main_process, process_count
from sleb_cli.requests import require_text
from sleb_plugins import OutputError, SlebError, UsageError
from sleb_plugins.errors import without_secrets

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13
UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EIO)
"""The errors of a file that cannot even be looked for."""

_GUESS = re.compile(r" \(Possible| Did you mean")
"""What Typer suggests for an unknown word."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sleb` and return its exit code; only a `SlebError` is caught, the rest are bugs."""
    from sleb_cli.app import app
    from sleb_cli.ui import console

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    try:
        for word in words:
            require_text(word)
        code = app(args=words, prog_name="sleb", standalone_mode=False)
        sys.stdout.flush()
    except WorkerFinished as finished:
        return finished.exit_code
    except typer.TyperException as error:
        return _report_usage(error, words)
    except SlebError as error:
        return _report(error, words)
    except OSError as error:
        return _report_file(error, words)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        console.print_warning("Interrupted. No half-written files were left behind.")
    return code if isinstance(code, int) else 0


def _report_usage(error: typer.TyperException, words: list[str]) -> int:
    """Print what is wrong with a command line, and return the exit code."""
    from sleb_cli.synonyms import hint_for

    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "sleb")
    message = error.format_message()
    option = getattr(error, "option_name", None)
    hint = hint_for(command, message, option, words)
    if not hint and message.startswith("No such option"):
        hint = _commands_with(option, context)
    if hint:
        message = _GUESS.split(message)[0]  # which is no better than ours
    code = _report(UsageError(message, hint=hint or f"See `{command} --help`."), words)
    # All processes read the same command line, and a launcher would end the main one before it
    # has spoken.
    return code if is_main_process() else 0


def _commands_with(option: str | None, context: Any) -> str | None:
    """Name the commands that have an option, which the one that was typed lacks."""
    owners = []
    for name, command in getattr(context.find_root().command, "commands", {}).items():
        if any(option in parameter.opts for parameter in command.params):
            owners.append(f"`sleb {name}`")
    return f"{option} is an option of {' and '.join(owners)}." if owners else None


def _report_file(error: OSError, words: list[str]) -> int:
    """Print that a file cannot be reached, and return the exit code; raise any other error."""
    from sleb_cli.names import elide

    if error.filename is None or error.errno not in UNREACHABLE:
        raise error
    name = elide(str(error.filename), 60)
    return _report(
        UsageError(
            f"{name} cannot be used: {error.strerror}.",
            hint="Check the name, and the permissions of its folder.",
        ),
        words,
    )


def _report(error: SlebError, words: list[str]) -> int:
    """Print an error, also as JSON if that was asked for, and return its exit code."""
    from sleb_cli.ui import console

    if isinstance(error, OutputError) and error.unsaved is not None:
        with suppress(OSError):  # stdout may be on the same full disk
            console.print_json(error.unsaved)
            sys.stdout.flush()
            console.print_warning(
                "The result could not be saved; it was printed on stdout as JSON."
            )
    elif "--json" in words:
        shown = {
            "class": type(error).__name__,
            "message": console.escape_controls(error.message),
            "hint": console.escape_controls(error.hint),
            "exit_code": error.exit_code,
        }
        console.print_json({"error": shown})
    console.print_error(error)
    return error.exit_code


def run() -> None:
    """Run as the program `sleb`: signals clean up like Ctrl-C, and work survives a closed pipe."""
    from sleb_cli.ui.console import Outlet, is_utf8

    codes: list[int] = []
    atexit.register(_exit_fast, codes)  # registered first, so it is called last
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not is_utf8(stream):
            stream.reconfigure(errors="backslashreplace")
    out = Outlet(sys.stdout)
    errors = Outlet(sys.stderr)
    sys.stdout = cast(TextIO, out)
    sys.stderr = cast(TextIO, errors)
    _handle_signals()
    try:
        code = main()
    except KeyboardInterrupt:  # once more, while the first one was being reported
        code = INTERRUPTED
    except Exception:
        # A bug: people post its traceback, so it must hold no tokens. Not by excepthook, which
        # Typer resets.
        errors.write(without_secrets(traceback.format_exc()))
        code = 1
    finally:
        errors.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to clean up
    if out.is_gone and code == 0:
        code = BROKEN_PIPE
    codes.append(code)
    sys.exit(code)


def _exit_fast(codes: list[int]) -> None:
    # All threads and exit handlers are done, and Python would take a second to tear torch down.
    # Without a code, a signal ends the process, and Python knows its code.
    if codes:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(codes[0])


def _handle_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # The shell has a job in the background, or under nohup, ignore a signal; it stays ignored.
        if number and (process_count() > 1 or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, _end)


def _end(number: int, frame: Any) -> None:
    """End with a clean-up that only a second Ctrl-C interrupts.

    The next run removes what that leaves.
    """
    # Of several processes, each gets two: from the terminal and from the launcher.
    at_once = number == signal.SIGINT and process_count() == 1
    signal.signal(number, signal.SIG_DFL if at_once else signal.SIG_IGN)
    if at_once and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # the bars hide the cursor, and could not show it again
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)


if __name__ == "__main__":
    run()
