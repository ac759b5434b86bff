"""Cut the slices of removed blocks out of a tensor that holds one slice for each block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
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

    def of_bytes(self, parts: Iterable[bytes | memoryview], shape: Sequence[int], size: int) -> Iterator[memoryview]:
        """Cut the bytes of a tensor of this shape and `size` in bytes as they arrive, whatever its data type."""
        row = size // math.prod(shape[: self.axis])
        rest = bytearray()
        for part in parts:
            rest += part
            whole = len(rest) // row * row
            if whole:
                rows = np.frombuffer(bytes(rest[:whole]), np.uint8).reshape(-1, self.kept.count, row // self.kept.count)
                yield rows[:, self.kept.blocks].reshape(-1).data
                del rest[:whole]
