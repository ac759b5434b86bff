"""Export a checkpoint folder like that of `sleb apply`, and check that stock engines can read it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sleb_plugins.errors import UnsupportedModelError
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning


class HuggingFace(FileExporter):
    """A checkpoint folder for transformers, text-generation-inference, SGLang, llama.cpp and others."""

    name = "hf"
    description = "a checkpoint folder with a config that stock engines can read"

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder, and check its config."""
        writer.write_checkpoint(output, lambda folder: require_stock_config(folder, pruning))
        return []


class Vllm(FileExporter):
    """A checkpoint folder for vLLM."""

    name = "vllm"
    description = "a checkpoint folder, and the command that serves it with vLLM"

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder, and check its config and, if vLLM is installed, that it supports the architecture."""

        def check(folder: Path) -> None:
            require_stock_config(folder, pruning)
            if find_spec("vllm"):
                _require_known_to_vllm(folder)

        folder = writer.write_checkpoint(output, check)
        unchecked = [] if find_spec("vllm") else ["vLLM is not installed, so its support of the model was not checked"]
        return [*unchecked, f"serve it: vllm serve {shlex.quote(str(folder))}"]


def require_stock_config(folder: Path, pruning: Pruning) -> None:
    """Make sure that engines can read the config without the model's own code.

    Raises:
        UnsupportedModelError: they cannot, or the config still has a value for each block of the original.
    """
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            "Stock engines cannot read the pruned config: transformers needs code that comes with the model.",
            hint="`sleb apply --trust-remote-code` writes the checkpoint anyway.",
        ) from error
    classes = [name for name in config.architectures or () if hasattr(transformers, name)]
    if not classes:
        raise UnsupportedModelError(
            f"The config names no class of transformers: its architectures are {config.architectures}.",
            hint="Name the class under `architectures` in the model's config.json, then try again.",
        )
    for key, values in _lists(config.to_dict()):
        if len(values) == pruning.blocks and ("layer" in key or "block" in key):
            raise UnsupportedModelError(
                f"{key} of the pruned config still has {pruning.blocks} values, one for each block of the original.",
                hint="Please report the model; `sleb apply` writes the checkpoint anyway.",
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

    names = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures
    if not set(names) & set(ModelRegistry.get_supported_archs()):
        raise UnsupportedModelError(
            f"The installed vLLM does not support {names[0]}.", hint="Upgrade vLLM, or export with --to hf."
        )
