"""`sleb bench`."""

from typing import Annotated

import typer

from sleb_cli import api
from sleb_cli.commands.dry_run import dry_run_of
from sleb_cli.commands.options import DryRunOption, JsonOption, QuietOption, takes
from sleb_cli.requests import BenchRequest
from sleb_cli.ui.bench import show_benchmark, show_estimate, show_markdown
from sleb_cli.ui.console import show
from sleb_cli.ui.progress import show_progress
from sleb_plugins import UsageError

MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print only a Markdown table like llama-bench's.")]


@takes(BenchRequest)
def bench(
    request: BenchRequest,
    markdown: MarkdownOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the speed, memory and energy of the dense and the pruned model, or predict speed and memory."""
    for option, given in (("--json", json), ("--estimate", request.estimate), ("--dry-run", dry_run)):
        if markdown and given:
            raise UsageError(f"--markdown does not apply to {option}.", hint="Leave out one of them.")
    if dry_run and request.estimate:
        raise UsageError("--dry-run does not apply to --estimate, which runs no model.", hint="Leave out one of them.")
    if dry_run:
        dry_run_of(request, json=json, quiet=quiet)
        return
    if request.estimate:
        with show_progress(quiet=quiet) as notify:
            predicted = api.estimate(request, notify)
        show(predicted, lambda: show_estimate(predicted, request.output), as_json=json)
        return
    with show_progress(quiet=quiet) as notify:
        result = api.bench(request, notify)
    table = (lambda: show_markdown(result)) if markdown else (lambda: show_benchmark(result, request.output))
    show(result, table, as_json=json)
