"""A pruned GGUF file, for llama.cpp and whatever is built on it."""

from collections.abc import Sequence
from pathlib import Path

from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning


class Gguf(FileExporter):
    """A GGUF file of the model without the blocks, with the weights of the source file as they are."""

    name = "gguf"
    description = "a pruned .gguf, from the model where it is one, or from --source"
    uses_source = True

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Remove the blocks from the source file.

        Raises:
            UsageError: there is no source file.
        """
        if pruning.source_file is None:
            raise UsageError(
                f"Which GGUF file of {pruning.model} is to lose its blocks?",
                hint="Name one with --source; llama.cpp's convert_hf_to_gguf.py makes one of a checkpoint.",
            )
        file = writer.write_gguf(pruning.source_file, output)
        return [f"run it: llama-cli -m {file}"]
