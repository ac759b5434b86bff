"""Export a pruned GGUF file for llama.cpp and the programs built on it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning


class Gguf(FileExporter):
    """A GGUF file without the removed blocks, with the source file's weights unchanged."""

    name = "gguf"
    description = "a pruned .gguf file, from a GGUF model or from --source"
    uses_source = True

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Remove the blocks from the source file.

        Raises:
            UsageError: no source file was named.
        """
        if pruning.source_file is None:
            raise UsageError(
                f"No GGUF file given for {pruning.model}.",
                hint="Name one with --source; llama.cpp's convert_hf_to_gguf.py converts a checkpoint.",
            )
        file = writer.write_gguf(pruning.source_file, output)
        return [f"run it: llama-cli -m {shlex.quote(str(file))}"]
