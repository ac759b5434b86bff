"""lm-eval's own command with `--model sleb`: `python -m sleb_cli.lm_eval run --model sleb …`.

Versions after 0.4.13 find it by themselves, through the entry point `lm_eval.models`.
"""

from __future__ import annotations

import sys

from sleb_cli.ui.console import print_error
from sleb_plugins import SlebError


def main() -> int:
    """Run the command, and return the exit code."""
    from lm_eval.__main__ import cli_evaluate

    import sleb_cli.engine.quality.lm_eval_model  # noqa: F401  registers it

    try:
        cli_evaluate()
    except SlebError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
