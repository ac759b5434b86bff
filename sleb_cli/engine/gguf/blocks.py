"""The number of blocks in a GGUF file, by its header and by its tensors."""

from __future__ import annotations

import re
from typing import Any

from sleb_cli.engine.gguf.file import GgufFile
from sleb_plugins.errors import ModelError, UnsupportedModelError

BLOCK = re.compile(r"blk\.([0-9]{1,9})(\..+)")
"""The name of a block's tensor: its number, and the rest."""


def stored_block_count(file: GgufFile) -> int:
    """Return the file's `block_count`, which includes the blocks for multi-token prediction."""
    return file.count("block_count") or 0


def block_count(file: GgufFile) -> int:
    """Return the number of the model's blocks, without blocks for multi-token prediction."""
    return stored_block_count(file) - (file.count("nextn_predict_layers") or 0)


def require_blocks(file: GgufFile) -> None:
    """Check that a file holds a model, with tensors of as many blocks as it says."""
    kind: Any = file.get("general.type") or "model"
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} is not a model: its general.type is {kind!r}.",
            hint="Name the file that holds the blocks.",
        )
    stored = file.count("block_count")
    numbers = set()
    for tensor in file.tensors:
        if match := BLOCK.fullmatch(tensor.name):
            numbers.add(int(match[1]))
    if not numbers or len(numbers) != stored or max(numbers) != stored - 1:
        raise ModelError(
            f"{file.path} says {stored} blocks ({file.architecture}.block_count), but has tensors "
            f"of {len(numbers)}.",
            hint="Name a GGUF file of a complete decoder-only language model.",
        )
