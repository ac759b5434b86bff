"""`sleb export`."""

from sleb_cli import api
from sleb_cli.commands.options import JsonOption, QuietOption, takes
from sleb_cli.requests import ExportRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.export import show_exported
from sleb_cli.ui.progress import show_progress


@takes(ExportRequest)
def export(request: ExportRequest, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Export a report, or the pruned model for another tool, as files or text."""
    with show_progress(quiet=quiet) as notify:
        result = api.export(request, notify)
    show(result, lambda: show_exported(result, request.output), as_json=json)
