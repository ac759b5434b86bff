"""The command line by which llama.cpp's own `llama-quantize` removes the blocks."""

import shlex
from pathlib import Path
from typing import Any

from sleb_plugins.errors import UnsupportedModelError
from sleb_plugins.exporter import Exporter, Pruning
from sleb_plugins.gguf.file import read_gguf
from sleb_plugins.gguf.surgery import PROVENANCE, plan_gguf_surgery


class LlamaQuantize(Exporter):
    """A command for `llama-quantize`, which can quantise in the same go: put a type in the place of COPY."""

    name = "llama-quantize"
    description = "the command by which llama.cpp removes the blocks, or quantises too"
    uses_source = True

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Give the command's words.

        Raises:
            UnsupportedModelError: there is a source file, and `llama-quantize` would leave some of it wrong.
        """
        source = pruning.source_file
        if source is not None:
            _require_that_the_count_is_all(source, pruning.removals)
        stem = source.with_suffix("") if source else Path(Path(pruning.model).name)
        kept = pruning.blocks - len(pruning.removals)
        command = ["llama-quantize", "--prune-layers", ",".join(map(str, pruning.removals))]
        return {"command": [*command, f"{stem}.gguf", f"{stem.name}-sleb-{kept}-blocks.gguf", "COPY"]}

    def render(self, pruning: Pruning) -> str:
        """Write the command as a shell reads it."""
        return shlex.join(self.document(pruning)["command"]) + "\n"


def _require_that_the_count_is_all(source: Path, removals: tuple[int, ...]) -> None:
    """Make sure that nothing but the number of blocks has to change: `llama-quantize` corrects nothing else."""
    file = read_gguf(source)
    pruned = plan_gguf_surgery(file, removals).pruned()
    before = set(file.entries)
    changed = [entry.key for entry in pruned.entries if entry not in before and entry.key != PROVENANCE]
    others = [key for key in changed if key != f"{file.architecture}.block_count"]
    if others:
        raise UnsupportedModelError(
            f"llama-quantize would number the blocks of {source} anew and leave {', '.join(others)} as it is.",
            hint="`sleb export --to gguf` changes that too.",
        )
