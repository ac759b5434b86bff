"""Load the plugins, and name each broken one once."""

from sleb_cli.plugin_manager import Registry, load_plugins
from sleb_cli.ui.console import print_warning


def load_and_report() -> Registry:
    """Load what is installed; a plugin that failed costs a line on stderr, and no more."""
    registry = load_plugins()
    for failure in registry.failures:
        print_warning(f"The plugin {failure.plugin} failed to load and is left out: {failure.reason}.")
    return registry
