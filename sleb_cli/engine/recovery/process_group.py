"""The processes that heal one model together, through `accelerate`, or a single process."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

from sleb_cli.processes import process_count


class ProcessGroup:
    """Communication between the processes. All of them must call the same methods in the same order."""

    def __init__(self, device: torch.device) -> None:
        self.size = process_count()
        self._accelerator: Any = Accelerator(cpu=device.type == "cpu") if self.size > 1 else None
        self.rank: int = self._accelerator.process_index if self._accelerator else 0
        self.device: torch.device = self._accelerator.device if self._accelerator else device

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors."""
        return self._accelerator.reduce(tensor, reduction="mean") if self._accelerator else tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the main process's tensor."""
        return broadcast(tensor) if self._accelerator else tensor

    def broadcast_number(self, number: float) -> float:
        """Return the main process's number, so that all processes decide alike."""
        if not self._accelerator:
            return number
        return float(broadcast_object_list([number])[0])

    def leave(self) -> None:
        """Wait for all processes, then shut the group down."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()
            self._accelerator.end_training()
            self._accelerator = None
