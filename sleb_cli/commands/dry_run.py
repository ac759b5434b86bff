"""`--dry-run`, which several commands have."""

from sleb_cli import api
from sleb_cli.requests import ApplyRequest, BenchRequest, EvalRequest, SearchRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.dry_run import show_dry_run
from sleb_cli.ui.progress import show_progress


def dry_run_of(request: SearchRequest | ApplyRequest | EvalRequest | BenchRequest, *, json: bool, quiet: bool) -> None:
    """Show what a request would do."""
    with show_progress(quiet=quiet) as notify:
        result = api.dry_run(request, notify)
    show(result, lambda: show_dry_run(result), as_json=json)
