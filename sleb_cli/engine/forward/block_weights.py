"""Where the weights of blocks are while they are not needed, and how they are aligned in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Aligned weights lie at multiples of this many bytes, the width of the widest vectors."""


class BlockWeights:
    """Where the weights of blocks are while they are not needed; here, all are in memory."""

    resident = True

    def visit(self, blocks: Iterable[int]) -> Generator[int]:
        """Yield these blocks one by one, each with its weights loaded until the next."""
        yield from blocks

    def align(self) -> None:
        """Align weights that are loaded later."""

    def replaced(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Load these values of parameters, by the model's names, while the context is open."""
        return nullcontext()


def aligned(value: Tensor) -> Tensor:
    """Return an aligned tensor, because fast kernels may round differently at other addresses."""
    return value.clone() if value.data_ptr() % ALIGNED else value


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which a module that accelerate placed computes; None for other modules."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)
