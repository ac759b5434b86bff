"""`sleb apply`."""

from sleb_cli import api
from sleb_cli.commands.dry_run import dry_run_of
from sleb_cli.commands.options import DryRunOption, JsonOption, QuietOption, takes
from sleb_cli.requests import ApplyRequest
from sleb_cli.ui.apply import show_applied
from sleb_cli.ui.console import show
from sleb_cli.ui.progress import show_progress


@takes(ApplyRequest)
def apply(
    request: ApplyRequest, dry_run: DryRunOption = False, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Write the pruned checkpoint or GGUF file, and prove that it computes what the search measured."""
    if dry_run:
        dry_run_of(request, json=json, quiet=quiet)
        return
    with show_progress(quiet=quiet) as notify:
        result = api.apply(request, notify)
    show(result, lambda: show_applied(result), as_json=json)
