"""The processes that heal one model together, by means of `accelerate`; or one alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from sleb_cli.processes import process_count


class ProcessGroup:
    """What processes say to each other. All must call the same methods in the same order."""

    def __init__(self, device: torch.device) -> None:
        self.size = process_count()
        self._accelerator: Any = Accelerator(cpu=device.type == "cpu") if self.size > 1 else None
        self.rank: int = self._accelerator.process_index if self._accelerator else 0
        self.device: torch.device = self._accelerator.device if self._accelerator else device

    def mean(self, tensor: Tensor) -> Tensor:
        """Give the mean of what all processes have."""
        return self._accelerator.reduce(tensor, reduction="mean") if self._accelerator else tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give what the main process has."""
        return broadcast(tensor) if self._accelerator else tensor

    def broadcast_number(self, number: float) -> float:
        """Give a number of the main process: what decides must not differ between processes."""
        if not self._accelerator:
            return number
        return float(self.broadcast(torch.tensor(number, dtype=torch.float64, device=self.device)))

    def leave(self) -> None:
        """End the team: wait for all, and let go of what held them together."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()
            self._accelerator.end_training()
            self._accelerator = None
