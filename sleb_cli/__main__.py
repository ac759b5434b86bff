"""`main()`: the one place that turns a `SlebError` into a sentence and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from sleb_cli.processes import WorkerFinished, is_main_process, process_count
from sleb_plugins import OutputError, SlebError, UsageError

INTERRUPTED = 130
TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sleb` and return its exit code; any error but a `SlebError` is a bug and keeps its traceback."""
    from sleb_cli.app import app
    from sleb_cli.ui import console

    try:
        code = app(args=arguments, prog_name="sleb", standalone_mode=False)
    except SlebError as error:
        if isinstance(error, OutputError) and error.unsaved is not None:
            console.print_json(error.unsaved)
            console.print_warning("The result could not be saved; it was printed on stdout as JSON.")
        console.print_error(error)
        return error.exit_code
    except typer.TyperException as error:
        console.print_error(UsageError(error.format_message(), hint=f"See `{_command(error)} --help`."))
        # All processes read the same command line, and a launcher would end the main one before it has spoken.
        return UsageError.exit_code if is_main_process() else 0
    except WorkerFinished as finished:
        return finished.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        console.print_warning("Interrupted. Nothing half-written was left.")
    return code if isinstance(code, int) else 0


def _command(error: typer.TyperException) -> str:
    """Return the command that was typed: "sleb search"."""
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "sleb"


def run() -> None:
    """Run as the program `sleb`; a request to end cleans up like Ctrl-C."""
    signal.signal(signal.SIGTERM, _once(SystemExit(TERMINATED)))
    if process_count() > 1:
        signal.signal(signal.SIGINT, _once(KeyboardInterrupt()))  # both the terminal and the launcher send it
    sys.exit(main())


def _once(error: BaseException) -> Callable[[int, Any], None]:
    """Return a handler that raises `error`; another signal like this does not disturb the end."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise error

    return handle


if __name__ == "__main__":
    run()
