"""The export formats that ship with `sleb`."""

from sleb_cli.exporters.checkpoint import HuggingFace, Vllm
from sleb_cli.exporters.draft import Draft
from sleb_cli.exporters.gguf import Gguf
from sleb_cli.exporters.indices import Indices
from sleb_cli.exporters.llama_quantize import LlamaQuantize
from sleb_cli.exporters.mergekit import MergekitRecipe
from sleb_cli.exporters.ollama import Ollama
from sleb_cli.exporters.report import Figures, Report
from sleb_cli.exporters.rows import Csv, JsonLines
from sleb_cli.exporters.summary import Summary
from sleb_plugins.exporter import Exporter, FileExporter
from sleb_plugins.hookspecs import hookimpl


@hookimpl
def sleb_exporters() -> list[Exporter | FileExporter]:
    """Offer the export formats that ship with `sleb`."""
    for_tools: list[Exporter | FileExporter] = [
        Gguf(), HuggingFace(), Vllm(), Draft(), Ollama(), LlamaQuantize(), MergekitRecipe(), Indices()
    ]  # fmt: skip
    return [*for_tools, Summary(), Csv(), JsonLines(), Report(), Figures()]
