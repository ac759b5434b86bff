"""Export a recipe for mergekit's merge method `passthrough`, which stacks ranges of blocks."""

from typing import Any

import yaml

from sleb_plugins.exporter import Exporter, Pruning


class MergekitRecipe(Exporter):
    """A passthrough recipe for `mergekit-yaml`; its `layer_range` is half-open."""

    name = "mergekit"
    only_counts = True
    description = "a passthrough recipe for mergekit-yaml"

    def export(self, pruning: Pruning) -> str:
        """Return the recipe as YAML, with a slice for each run of remaining blocks."""
        model: Any = pruning.model
        if "@" in pruning.model or "+" in pruning.model:
            # In a plain name, mergekit reads them as a revision and an adapter.
            model = {"model": {"path": pruning.model, "revision": pruning.revision}}
        elif pruning.revision:
            model = f"{pruning.model}@{pruning.revision}"
        slices = []
        for low, high in pruning.kept_ranges:
            slices.append({"sources": [{"model": model, "layer_range": [low, high]}]})
        recipe = {"slices": slices, "merge_method": "passthrough", "dtype": pruning.dtype}
        return str(yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None))
