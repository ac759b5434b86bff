"""`main()`: the one place that turns a `SlebError` into a sentence and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import typer

from sleb_cli.processes import WorkerFinished
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
        return UsageError.exit_code
    except WorkerFinished:
        return 0
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main())


if __name__ == "__main__":
    run()
