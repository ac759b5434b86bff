"""Export the block numbers alone, for scripts and tools that take a list."""

from typing import Any

from sleb_plugins.exporter import Exporter, Pruning


class Indices(Exporter):
    """The removed blocks on one line, separated by commas, in the order of their removal."""

    name = "indices"
    description = "the removed blocks on one line; with --json, the kept ones too"

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Return the model with its removed and kept blocks."""
        kept = [block for low, high in pruning.kept_ranges for block in range(low, high)]
        return {
            "model": pruning.model,
            "revision": pruning.revision,
            "blocks": pruning.blocks,
            "removals": list(pruning.removals),
            "kept": kept,
        }

    def render(self, pruning: Pruning) -> str:
        """Return the removed blocks in the format of `--blocks`."""
        return ",".join(map(str, pruning.removals)) + "\n"
