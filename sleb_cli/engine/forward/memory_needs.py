"""Bytes of memory that a model and its passes need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sleb_cli.engine.files.headers import StoredTensor
from sleb_cli.engine.files.pickles import TORCH_DTYPES
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.padded import Tokens
from sleb_cli.engine.transformers_internals import WeightConverter, get_model_conversion_mapping
from sleb_plugins import UnsupportedModelError

COPIES_OF_LOGITS = 3
"""In the model's data type at once: the model's, the dense model's, and a copy."""
COPIES_WIDENED = 6
"""In float32 at once, while a metric takes softmaxes of both models' logits and multiplies them."""


def model_bytes(architecture: Architecture, dtype: torch.dtype, *, stream: bool = False) -> int:
    """Return the bytes of the weights in this data type; packed weights stay as in the files."""
    if not stream:
        return _bytes_as(dtype, architecture.source.weights.stored)
    # Everything outside the blocks, the block that computes, and the one that is read.
    by_block, outside = tensors_by_block(architecture)
    needed = _bytes_as(dtype, outside) + 2 * max(_bytes_as(dtype, block) for block in by_block)
    dtypes = {TORCH_DTYPES.get(tensor.dtype) for block in by_block for tensor in block}
    if dtypes == {dtype} and converted_bytes(architecture, dtype) == 0:
        return needed
    # Tensors that are converted exist in both forms.
    return needed + max(sum(tensor.size for tensor in block) for block in by_block)


def converted_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes that transformers writes to disk when it converts blocks that stay there."""
    for plan in get_model_conversion_mapping(architecture.skeleton):
        if isinstance(plan, WeightConverter):
            return model_bytes(architecture, dtype)
    return 0


def states_bytes(architecture: Architecture, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of the hidden states of these tokens at one depth."""
    width: int = architecture.text_config.hidden_size
    return tokens * width * dtype.itemsize


def tensors_by_block(
    architecture: Architecture,
) -> tuple[list[list[StoredTensor]], list[StoredTensor]]:
    """Return the stored tensors of each block, and the stored tensors outside the blocks."""
    by_block: list[list[StoredTensor]] = [[] for _ in range(architecture.block_count)]
    outside = []
    for tensor in architecture.source.weights.stored:
        block = architecture.names.block_of(tensor.name)
        if block is None:
            outside.append(tensor)
        elif block < len(by_block):  # those behind predict further tokens, and no model loads them
            by_block[block].append(tensor)
    return by_block, outside


def _bytes_as(dtype: torch.dtype, tensors: Sequence[StoredTensor]) -> int:
    total = 0
    for tensor in tensors:
        stored = TORCH_DTYPES.get(tensor.dtype)
        if stored is not None and stored.is_floating_point and stored.itemsize > 1:
            total += math.prod(tensor.shape) * dtype.itemsize
        else:  # whole numbers, and packed weights
            total += tensor.size
    return total


@dataclass(frozen=True)
class Footprint:
    """The bytes of a token: in a branch of hidden states, inside a block, as logits, in scoring."""

    branch: int
    block: int
    logits: int
    scored: int

    def working_bytes(self, tokens: int, positions: int, widened: int) -> int:
        """Return the bytes in use while a block or the head runs on a batch of this many tokens.

        Logits of `positions` exist at once, and of `widened` bytes of them in float32.
        """
        # The base, a candidate's branch and its next states; the inside of a block; a slice of
        # logits, and its scores.
        scored = min(positions * self.scored, COPIES_WIDENED * widened)
        return tokens * (3 * self.branch + self.block) + positions * self.logits + scored


def measure_footprint(skippable: SkippableModel, ids: Tokens) -> Footprint:
    """Measure the bytes that a few tokens take; for a block's inside, go by its widest weight."""
    entering: list[Tensor] = []
    others = range(1, len(skippable.switches))
    skippable.run_with_hook(ids, others, lambda block, before, after: entering.append(before))
    if not entering:
        raise UnsupportedModelError(
            f"{skippable.model.config.model_type} calls none of its blocks.",
            hint="Open an issue that names this family.",
        )
    hidden = entering[0]
    logits = skippable.ending.of_model(skippable, ids, range(len(skippable.switches)))
    width = hidden.shape[-1]
    widest = width
    for switch in skippable.switches:
        for module in switch.block.modules():
            widest = max(widest, _width(module))
    return Footprint(
        branch=hidden.nbytes // ids.numel(),
        block=4 * (8 * width + 4 * widest),
        logits=COPIES_OF_LOGITS * logits.shape[-1] * logits.itemsize,
        scored=COPIES_WIDENED * logits.shape[-1] * 4,
    )


def _width(module: nn.Module) -> int:
    # Attributes come first, because packed weights have other shapes.
    width: int = max(getattr(module, "in_features", 0), getattr(module, "out_features", 0))
    if width:
        return width
    sizes = [max(weight.shape, default=1) for weight in module.parameters(recurse=False)]
    return max(sizes, default=1)
