"""Where the weights of blocks are while they are not needed, and how they are aligned in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Aligned weights lie at multiples of this many bytes, the width of the widest vectors."""


class Visit:
    """Blocks that run one after the other; the weights of each are loaded until the next one's."""

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(self, block: int) -> None:
        """Load the weights of the next block of the visit."""

    def close(self) -> None:
        """Put the last block's weights away."""


class BlockWeights:
    """Where the weights of blocks are while they are not needed; here, all are in memory."""

    resident = True

    def visit(self, blocks: Sequence[int]) -> Visit:
        """Return a visit to these blocks, in this order."""
        return Visit()

    def align(self) -> None:
        """Align weights that are loaded later."""

    def replaced(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Load these values of parameters, by the model's names, while the context is open."""
        return nullcontext()


def aligned(value: Tensor) -> Tensor:
    """Return an aligned tensor, because fast kernels may round differently at other addresses."""
    if value.data_ptr() % ALIGNED:
        return value.clone()
    return value


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where a module that accelerate placed computes; None for other modules."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return None
    return torch.device(device)
