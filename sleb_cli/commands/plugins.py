"""`sleb plugins`."""

from sleb_cli.commands.options import JsonOption


def plugins(json: JsonOption = False) -> None:
    """List the families, metrics and export formats that are installed, and what failed to load."""
    from sleb_cli.plugin_manager import load_plugins
    from sleb_cli.ui.plugins import show_plugins

    show_plugins(load_plugins(), as_json=json)
