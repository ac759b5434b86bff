"""Export a recipe for mergekit, whose merge method `passthrough` stacks ranges of blocks."""

from typing import Any

import yaml

from sleb_plugins.exporter import Exporter, Pruning


class MergekitRecipe(Exporter):
    """A passthrough recipe for `mergekit-yaml`; its `layer_range` is half-open."""

    name = "mergekit"
    description = "a passthrough recipe for mergekit-yaml"

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Return a recipe with one slice for each run of kept blocks."""
        model = f"{pruning.model}@{pruning.revision}" if pruning.revision else pruning.model
        slices = [{"sources": [{"model": model, "layer_range": [low, high]}]} for low, high in pruning.kept_ranges]
        return {"slices": slices, "merge_method": "passthrough", "dtype": pruning.dtype}

    def render(self, pruning: Pruning) -> str:
        """Return the recipe as YAML."""
        return str(yaml.safe_dump(self.document(pruning), sort_keys=False, default_flow_style=None))
