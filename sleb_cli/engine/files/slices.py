"""Cut the slices of removed blocks out of a tensor that holds one slice for each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sleb_plugins.config_keys import Kept


@dataclass(frozen=True)
class Cut:
    """The slices of the kept blocks along one axis of a tensor, such as Gemma 3n's per-layer embeddings."""

    axis: int
    kept: Kept

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape after the cut."""
        width = shape[self.axis] // self.kept.count * len(self.kept.blocks)
        return (*shape[: self.axis], width, *shape[self.axis + 1 :])

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a tensor in memory."""
        width = tensor.shape[self.axis] // self.kept.count
        slices = torch.split(tensor, width, self.axis)
        return torch.cat([slices[block] for block in self.kept.blocks], self.axis)
