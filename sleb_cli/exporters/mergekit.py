"""Export a recipe for mergekit, whose merge method `passthrough` stacks ranges of blocks."""

import yaml

from sleb_plugins.exporter import Exporter, Pruning


class MergekitRecipe(Exporter):
    """A passthrough recipe for `mergekit-yaml`; its `layer_range` is half-open."""

    name = "mergekit"
    description = "a passthrough recipe for mergekit-yaml"

    def export(self, pruning: Pruning) -> str:
        """Return the recipe as YAML, with a slice for each run of remaining blocks."""
        model = f"{pruning.model}@{pruning.revision}" if pruning.revision else pruning.model
        slices = [{"sources": [{"model": model, "layer_range": [low, high]}]} for low, high in pruning.kept_ranges]
        recipe = {"slices": slices, "merge_method": "passthrough", "dtype": pruning.dtype}
        return str(yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None))
