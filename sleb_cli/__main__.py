"""`main()`: the one place that turns a `SlebError` into a sentence and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import typer

from sleb_plugins import SlebError, UsageError

INTERRUPTED = 130
TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sleb` and give its exit code; what is not a `SlebError` is a bug and keeps its traceback."""
    from sleb_cli.app import app
    from sleb_cli.ui import console

    try:
        code = app(args=arguments, prog_name="sleb", standalone_mode=False)
    except SlebError as error:
        console.print_error(error)
        return error.exit_code
    except typer.TyperException as error:
        hint = "`sleb --help` and `sleb COMMAND --help` show what there is."
        console.print_error(UsageError(error.format_message(), hint=hint))
        return UsageError.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        console.print_warning("Interrupted. Nothing half-written was left.")
    return code if isinstance(code, int) else 0


def run() -> None:
    """Be the program `sleb`: also when asked to end by a signal, clean up and leave nothing half-written."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main())


if __name__ == "__main__":
    run()
