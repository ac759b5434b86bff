"""Export the block numbers, for scripts and tools that take a list."""

from sleb_plugins.exporter import Exporter, Pruning


class Indices(Exporter):
    """The removed blocks on one line, in the order of their removal, as `--blocks` takes them."""

    name = "indices"
    description = "the removed blocks on one line"
    plan_suffices = True

    def export(self, pruning: Pruning) -> str:
        """Return the line."""
        return ",".join(map(str, pruning.removals)) + "\n"
