"""`sleb env`."""

from sleb_cli import api
from sleb_cli.commands.options import JsonOption
from sleb_cli.ui.console import show
from sleb_cli.ui.env import show_environment
from sleb_cli.ui.progress import show_progress


def env(json: JsonOption = False) -> None:
    """Show what a bug report needs: versions, processor, memory, devices, cache and plugins."""
    with show_progress(quiet=False) as notify:
        result = api.env(notify)
    show(result, lambda: show_environment(result), as_json=json)
