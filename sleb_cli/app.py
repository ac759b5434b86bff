"""The Typer app: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from sleb_cli.commands.apply import apply
from sleb_cli.commands.bench import bench
from sleb_cli.commands.env import env
from sleb_cli.commands.eval import eval_
from sleb_cli.commands.export import export
from sleb_cli.commands.plugins import plugins
from sleb_cli.commands.rerun import rerun
from sleb_cli.commands.search import search
from sleb_cli.version import __version__

app = typer.Typer(
    name="sleb",
    help="Make large language models faster by removing whole transformer blocks, without training.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sleb {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def sleb(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make large language models faster by removing whole transformer blocks, without training."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(search)
app.command()(apply)
app.command("eval")(eval_)
app.command()(bench)
app.command()(export)
app.command()(rerun)
app.command()(plugins)
app.command()(env)
