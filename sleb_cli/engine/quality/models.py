"""The dense and the pruned models of an evaluation, loaded when something is measured that is not cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify


class Models:
    """The dense model and one for each surgery, which share its weights."""

    def __init__(
        self,
        architecture: Architecture,
        surgeries: Sequence[Surgery],
        dtype: torch.dtype,
        device: torch.device,
        notify: Notify,
    ) -> None:
        self.architecture, self.surgeries, self.device = architecture, surgeries, device
        self._dtype, self._notify = dtype, notify
        self._loaded: dict[tuple[int, ...], Any] = {}

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The removals of each model, none for the dense one, which is first."""
        return [(), *(surgery.removals for surgery in self.surgeries)]

    def without(self, removals: tuple[int, ...]) -> Any:
        """Return the model without these blocks, one of `sizes`.

        Packed weights cannot be shared, so a quantized model takes the place of the one that was loaded before.
        """
        if removals not in self._loaded:
            if self.architecture.is_quantized:
                self._loaded.clear()
                free_memory()
            self._loaded[removals] = self._load(removals)
        return self._loaded[removals]

    def _load(self, removals: tuple[int, ...]) -> Any:
        if not removals:
            return load_dense(self.architecture, self._dtype, self.device, self._notify)
        surgery = next(surgery for surgery in self.surgeries if surgery.removals == removals)
        dense = None if self.architecture.is_quantized else self.without(())
        return load_pruned(surgery, self._dtype, self.device, self._notify, dense=dense)
