"""Export the command with which llama.cpp's `llama-quantize` removes the blocks."""

from pathlib import Path

from sleb_cli.units import in_shell
from sleb_plugins.errors import UnsupportedModelError
from sleb_plugins.exporter import Exporter, Pruning


class LlamaQuantize(Exporter):
    """A command for `llama-quantize`, which can also quantize: replace COPY with a type."""

    name = "llama-quantize"
    description = "the llama.cpp command that removes the blocks, and can quantize"
    only_counts = True
    uses_source = True

    def export(self, pruning: Pruning) -> str:
        """Return the command, quoted for a shell.

        Raises:
            UnsupportedModelError: `llama-quantize` would leave some metadata of the source file
                wrong.
        """
        source = pruning.source_file
        if source is None:
            source = Path(f"{Path(pruning.model).name}.gguf")
        else:
            _require_only_count_changes(source, pruning.removals)
        remaining = pruning.blocks - len(pruning.removals)
        target = in_shell(f"{source.stem}-sleb-{remaining}-blocks.gguf")
        layers = ",".join(map(str, pruning.removals))
        return f"llama-quantize --prune-layers {layers} {in_shell(str(source))} {target} COPY\n"


def _require_only_count_changes(source: Path, removals: tuple[int, ...]) -> None:
    from sleb_cli.engine.gguf.file import read_gguf  # which imports NumPy
    from sleb_cli.engine.gguf.removed_parts import REMOVED_BLOCKS
    from sleb_cli.engine.surgery.gguf_surgery import plan_gguf_surgery  # which imports torch

    file = read_gguf(source)
    pruned = plan_gguf_surgery(file, removals).pruned()
    corrected = (REMOVED_BLOCKS, f"{file.architecture}.block_count")
    wrong = []
    for entry in pruned.entries:
        if entry not in file.entries and entry.key not in corrected:
            wrong.append(entry.key)
    if wrong:
        raise UnsupportedModelError(
            f"llama-quantize would renumber the blocks of {source} but not correct "
            f"{', '.join(wrong)}.",
            hint="Use `sleb apply --source`, which corrects it.",
        )
