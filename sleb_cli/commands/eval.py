"""`sleb eval`."""

from sleb_cli import api
from sleb_cli.commands.dry_run import dry_run_of
from sleb_cli.commands.options import DryRunOption, JsonOption, QuietOption, takes
from sleb_cli.requests import EvalRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.eval import show_evaluation
from sleb_cli.ui.progress import show_progress


@takes(EvalRequest)
def eval_(
    request: EvalRequest, dry_run: DryRunOption = False, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Compare the quality of the dense and the pruned model: perplexity and lm-eval tasks."""
    if dry_run:
        dry_run_of(request, json=json, quiet=quiet)
        return
    with show_progress(quiet=quiet) as notify:
        result = api.evaluate(request, notify)
    show(result, lambda: show_evaluation(result, request.output), as_json=json)
