"""`sleb bench`."""

from sleb_cli import api
from sleb_cli.commands.options import JsonOption, QuietOption, takes
from sleb_cli.requests import BenchRequest
from sleb_cli.ui.bench import show_benchmark
from sleb_cli.ui.console import show
from sleb_cli.ui.progress import show_progress


@takes(BenchRequest)
def bench(request: BenchRequest, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Measure speed and memory, dense and pruned in alternation."""
    with show_progress(quiet=quiet) as notify:
        result = api.bench(request, notify)
    show(result, lambda: show_benchmark(result, request.output), as_json=json)
