"""The commands: each hands a request to the engine, and shows the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sleb_cli import api
from sleb_cli.commands.options import How, JsonOption, options_from
from sleb_cli.events import Notice
from sleb_cli.plugin_manager import load_registry
from sleb_cli.requests import ApplyRequest, BenchRequest, EvalRequest, ExportRequest, SearchRequest
from sleb_cli.ui import summaries
from sleb_cli.ui.console import print_json
from sleb_cli.ui.plugins import show_plugins
from sleb_cli.ui.progress import show_progress
from sleb_cli.ui.tables import print_to_copy

if TYPE_CHECKING:
    from pathlib import Path

    from sleb_cli.events import Notify
    from sleb_cli.plan import Plan
    from sleb_cli.records import Record

R = TypeVar("R", bound="Record")

app = typer.Typer(
    name="sleb",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        from sleb_cli.engine.versions import describe_installation

        for line in describe_installation():
            print_to_copy(line)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def sleb(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show versions, the processor and devices, for a bug report.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Make language models, embedding models and classifiers smaller and faster by removing
    transformer blocks or experts, without training.

    A block (most say layer) is attention and an MLP; each token passes through
    a few dozen, one after the other. Start with `sleb search demo --ratio 0.2`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _run(
    call: Callable[[Any, Notify], R], request: Any, show: Callable[[R], None], how: How
) -> None:
    with show_progress(quiet=how.quiet) as notify:
        result = call(request, notify)
    if how.json:
        print_json(result.to_data())
    else:
        show(result)


def _search_like(config: Path | None) -> Callable[[SearchRequest, Notify], Plan]:
    """Return the search, which compares its plan with `config` if that is a plan."""
    from sleb_cli.plan import compare_plans, read_plan

    before = read_plan(config) if config and config.suffix == ".json" else None

    def search(request: SearchRequest, notify: Notify) -> Plan:
        plan = api.search(request, notify)
        if before:
            notify(Notice(compare_plans(before, plan)))
        return plan

    return search


@app.command()
@options_from(SearchRequest)
def search(request: SearchRequest, how: How) -> None:
    """Find the blocks or experts that MODEL needs least, and write them to a plan.

    sleb search demo --ratio 0.2
    sleb search org/name --remove 6 --calibration chats.jsonl -o six.json
    """
    from sleb_cli.ui.plans import show_plan  # with pydantic, which `sleb --help` does not wait for

    _run(_search_like(how.config), request, lambda plan: show_plan(plan, request.plan_file), how)


@app.command()
@options_from(ApplyRequest)
def apply(request: ApplyRequest, how: How) -> None:
    """Write the pruned checkpoint or GGUF file, and prove it against the dense model.

    sleb apply plan.json --recover
    sleb apply model.gguf --blocks 12-15 -o smaller.gguf
    """
    _run(api.apply, request, summaries.show_applied, how)


@app.command("eval")
@options_from(EvalRequest)
def eval_(request: EvalRequest, how: How) -> None:
    """Compare the quality of the dense (original) and the pruned model, or of any two models.

    sleb eval plan.json --perplexity wikitext2 --tasks piqa,canaries
    sleb eval smaller/ --against org/name
    """
    _run(
        api.evaluate, request, lambda result: summaries.show_evaluation(result, request.output), how
    )


@app.command()
@options_from(BenchRequest)
def bench(request: BenchRequest, how: How) -> None:
    """Measure the speed and memory of the dense (original) and the pruned model.

    sleb bench plan.json
    sleb bench plan.json --engine llama.cpp --source model.gguf
    """
    _run(api.bench, request, lambda result: summaries.show_benchmark(result, request.output), how)


@app.command()
@options_from(ExportRequest)
def export(request: ExportRequest, how: How) -> None:
    """Export a report, a table of plans, or the removals for another tool.

    sleb export plan.json --to report
    sleb export plan.json other.json --to table -o table.md
    """
    _run(api.export, request, summaries.show_exported, how)


@app.command()
def plugins(json: JsonOption = False) -> None:
    """List the installed families, metrics, export formats and engines, and what failed to load.

    sleb plugins
    sleb plugins --json
    """
    with show_progress() as notify:
        registry = load_registry(notify)
    show_plugins(registry, as_json=json)
