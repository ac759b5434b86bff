"""`sleb search`."""

from sleb_cli import api
from sleb_cli.commands.dry_run import dry_run_of
from sleb_cli.commands.options import DryRunOption, JsonOption, QuietOption, takes
from sleb_cli.requests import SearchRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.progress import show_progress
from sleb_cli.ui.search import show_comparison, show_plan


@takes(SearchRequest)
def search(
    request: SearchRequest, dry_run: DryRunOption = False, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Find the blocks that MODEL needs least, and write them to a plan."""
    if dry_run:
        dry_run_of(request, json=json, quiet=quiet)
    elif request.compare:
        with show_progress(quiet=quiet) as notify:
            result = api.compare(request, notify)
        show(result, lambda: show_comparison(result, request.plan_file), as_json=json)
    else:
        with show_progress(quiet=quiet) as notify:
            plan = api.search(request, notify)
        show(plan, lambda: show_plan(plan, request.plan_file), as_json=json)
