"""Cut out of a tensor the slices that stay: those of kept blocks, or of kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cut:
    """The slices that stay of `count` along one axis of a tensor, such as a block's part of per-layer embeddings."""

    axis: int
    count: int
    kept: Sequence[int]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape after the cut."""
        width = shape[self.axis] // self.count * len(self.kept)
        return (*shape[: self.axis], width, *shape[self.axis + 1 :])

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a tensor in memory."""
        shape, kept = tensor.shape, torch.tensor(self.kept, device=tensor.device)
        width = shape[self.axis] // self.count
        slices = tensor.reshape(*shape[: self.axis], self.count, width, *shape[self.axis + 1 :])
        return slices.index_select(self.axis, kept).reshape(self.shape(shape))
