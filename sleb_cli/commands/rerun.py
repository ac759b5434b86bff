"""`sleb rerun`."""

from sleb_cli import api
from sleb_cli.commands.options import JsonOption, QuietOption, takes
from sleb_cli.requests import RerunRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.progress import show_progress
from sleb_cli.ui.rerun import show_rerun


@takes(RerunRequest)
def rerun(request: RerunRequest, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Repeat the search of PLAN from what it recorded, and report whether it finds the same blocks."""
    with show_progress(quiet=quiet) as notify:
        result = api.rerun(request, notify)
    show(result, lambda: show_rerun(result), as_json=json)
