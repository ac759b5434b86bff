"""`sleb plugins`."""

from sleb_cli.commands.options import JsonOption
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.ui.plugins import show_plugins


def plugins(json: JsonOption = False) -> None:
    """List the installed families, metrics, export formats and engines, and what failed to load."""
    show_plugins(load_plugins(), as_json=json)
