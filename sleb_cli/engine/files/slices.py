"""Cut out of a tensor the slices that stay, such as the rows of kept tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sleb_cli.engine.files.copying import runs


@dataclass(frozen=True)
class Slices:
    """The slices that stay of `count` along one axis of a tensor.

    For example a block's slice of per-layer embeddings.
    """

    axis: int
    count: int
    kept: Sequence[int]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape after the cut."""
        width = shape[self.axis] // self.count * len(self.kept)
        return (*shape[: self.axis], width, *shape[self.axis + 1 :])

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a tensor in memory."""
        slices = torch.unflatten(tensor, self.axis, (self.count, -1))
        indices = torch.tensor(self.kept, device=tensor.device)
        return slices.index_select(self.axis, indices).flatten(self.axis, self.axis + 1)

    def ranges(self, shape: Sequence[int], size: int) -> list[tuple[int, int]] | None:
        """Return offsets and sizes of their bytes, neighbors joined; None if not contiguous."""
        # A slice is contiguous only if all axes before it have one entry.
        if math.prod(shape[: self.axis]) != 1 or size % self.count:
            return None
        width = size // self.count
        return [(first * width, length * width) for first, length in runs(self.kept)]
