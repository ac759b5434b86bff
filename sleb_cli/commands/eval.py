"""`sleb eval`."""

from sleb_cli import api
from sleb_cli.commands.options import JsonOption, QuietOption, takes
from sleb_cli.requests import EvalRequest
from sleb_cli.ui.console import show
from sleb_cli.ui.eval import show_evaluation
from sleb_cli.ui.progress import show_progress


@takes(EvalRequest)
def eval_(request: EvalRequest, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Compare the quality of the dense and the pruned model: perplexity and lm-eval tasks."""
    with show_progress(quiet=quiet) as notify:
        result = api.evaluate(request, notify)
    show(result, lambda: show_evaluation(result, request.output), as_json=json)
