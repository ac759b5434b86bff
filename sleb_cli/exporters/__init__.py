"""The export formats that ship with `sleb`."""

from sleb_cli.exporters.indices import Indices
from sleb_cli.exporters.llama_quantize import LlamaQuantize
from sleb_cli.exporters.mergekit import MergekitRecipe
from sleb_cli.exporters.report.report import Report
from sleb_cli.exporters.table.plans_table import PlansTable
from sleb_plugins.exporter import Exporter
from sleb_plugins.hookspecs import hookimpl


@hookimpl
def sleb_exporters() -> list[Exporter]:
    """Offer the export formats that ship with `sleb`."""
    return [Report(), PlansTable(), LlamaQuantize(), MergekitRecipe(), Indices()]
