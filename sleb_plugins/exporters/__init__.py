"""The export formats that ship with `sleb`."""

from sleb_plugins.exporter import Exporter
from sleb_plugins.exporters.indices import Indices
from sleb_plugins.exporters.mergekit import MergekitRecipe
from sleb_plugins.hookspecs import hookimpl


@hookimpl
def sleb_exporters() -> list[Exporter]:
    """Offer the export formats that ship with `sleb`."""
    return [MergekitRecipe(), Indices()]
