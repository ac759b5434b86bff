"""The checkpoint folder of `sleb apply`, once more looked at as stock engines will."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sleb_plugins.errors import UnsupportedModelError
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning


class HuggingFace(FileExporter):
    """A checkpoint folder for whatever loads those: transformers, text-generation-inference, SGLang, llama.cpp."""

    name = "hf"
    description = "a checkpoint folder whose config stock engines read"

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder, and make sure of its config."""
        writer.write_checkpoint(output, lambda folder: require_stock_config(folder, pruning))
        return []


class Vllm(FileExporter):
    """A checkpoint folder for vLLM."""

    name = "vllm"
    description = "a checkpoint folder, and the line that serves it with vLLM"

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder, and make sure of its config and, where vLLM is installed, of what that knows."""

        def check(folder: Path) -> None:
            require_stock_config(folder, pruning)
            if find_spec("vllm"):
                _require_known_to_vllm(folder)

        folder = writer.write_checkpoint(output, check)
        unchecked = [] if find_spec("vllm") else ["vLLM is not installed here, so nobody asked it for the architecture"]
        return [*unchecked, f"serve it: vllm serve {shlex.quote(str(folder))}"]


def require_stock_config(folder: Path, pruning: Pruning) -> None:
    """Make sure that the config is one that engines read without code of the model's own.

    Raises:
        UnsupportedModelError: it is not, or it still has a value for each block of the original.
    """
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            "The pruned config is none that stock engines read: transformers needs code that comes with the model.",
            hint="`sleb apply --trust-remote-code` writes the checkpoint all the same.",
        ) from error
    classes = [name for name in config.architectures or () if hasattr(transformers, name)]
    if not classes:
        raise UnsupportedModelError(
            f"The config names no class that transformers has: its architectures are {config.architectures}.",
            hint="Name the class in the model's config.json, then try again.",
        )
    for key, values in _lists(config.to_dict()):
        if len(values) == pruning.blocks and ("layer" in key or "block" in key):
            raise UnsupportedModelError(
                f"{key} of the pruned config still has {pruning.blocks} values, one for each block of the original.",
                hint="Report the model to us; `sleb apply` writes the checkpoint all the same.",
            )


def _lists(config: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for key, value in config.items():
        if isinstance(value, list):
            yield key, value
        elif isinstance(value, dict):
            yield from _lists(value)


def _require_known_to_vllm(folder: Path) -> None:
    import transformers
    from vllm import ModelRegistry

    names = transformers.AutoConfig.from_pretrained(folder).architectures
    if not set(names) & set(ModelRegistry.get_supported_archs()):
        raise UnsupportedModelError(
            f"The installed vLLM knows no model {names[0]}.", hint="Upgrade vLLM, or export with --to hf."
        )
