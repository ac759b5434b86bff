"""The dense and the pruned models of an evaluation, loaded only if something is not in the cache."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.forward.placement import Placement, open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify


class Models:
    """The dense model and one for each surgery; they share weights if they can."""

    def __init__(
        self,
        architecture: Architecture,
        surgeries: Sequence[Surgery],
        placement: Placement,
        notify: Notify,
    ) -> None:
        self.architecture, self.placement, self._notify = architecture, placement, notify
        self._surgeries = {surgery.removals: surgery for surgery in surgeries}
        self.sizes: list[tuple[int, ...]] = [(), *self._surgeries]
        """The removals of each model; the dense one is first, and has none."""
        self.is_single = architecture.is_quantized or placement.device_map is not None or placement.stream
        """Whether only one model is open at a time: no other can share packed, spread or streamed weights with it."""
        self._loaded: dict[tuple[int, ...], SkippableModel] = {}

    def without(self, removals: tuple[int, ...]) -> SkippableModel:
        """Return the model without these blocks, one of `sizes`.

        If models do not share weights, it takes the place of the one that was loaded before.
        """
        if removals not in self._loaded:
            if self.is_single:
                self._loaded.clear()
                free_memory()
            self._loaded[removals] = self._load(removals)
        return self._loaded[removals]

    def _load(self, removals: tuple[int, ...]) -> SkippableModel:
        if not removals:
            return open_dense(self.architecture, self.placement, self._notify)
        surgery, place = self._surgeries[removals], self.placement
        dense = None if self.is_single else self.without(()).model
        model = load_pruned(surgery, place.dtype, place.device, self._notify, dense=dense, device_map=place.device_map)
        return SkippableModel(model, self.architecture.blocks_of(model))
