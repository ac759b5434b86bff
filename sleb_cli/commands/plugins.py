"""`sleb plugins`."""

from sleb_cli.commands.options import JsonOption
from sleb_cli.plugin_manager import load_plugins, named_before_loading
from sleb_cli.ui.console import print_note
from sleb_cli.ui.plugins import show_plugins


def plugins(json: JsonOption = False) -> None:
    """List the installed families, metrics, export formats and engines, and what failed to load."""
    if others := named_before_loading():
        print_note(others)
    show_plugins(load_plugins(), as_json=json)
