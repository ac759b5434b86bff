"""The dense and the pruned models of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.forward.placement import open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify


class Models:
    """The dense model and one for each size, loaded when first needed; they share weights if they can."""

    def __init__(
        self, subject: Subject, surgeries: Sequence[Surgery], placement: Placement, group: ProcessGroup, notify: Notify
    ) -> None:
        self.subject, self.architecture = subject, subject.architecture
        self.placement, self.group, self.notify = placement, group, notify
        self._surgeries = {surgery.removals: surgery for surgery in surgeries}
        self.sizes = tuple(self._surgeries)
        """The removals of each pruned model."""
        self.one_at_a_time = self.architecture.is_quantized or placement.device_map is not None or placement.stream
        """Whether only one model is open at a time: no other can share packed, spread or streamed weights with it."""
        self._loaded: dict[tuple[int, ...], SkippableModel] = {}

    def without(self, removals: tuple[int, ...]) -> SkippableModel:
        """Return the model without these blocks, one of `sizes`, or the dense one without any.

        If models do not share weights, it takes the place of the one that was loaded before.
        """
        if removals not in self._loaded:
            if self.one_at_a_time:
                self._loaded.clear()
                free_memory()
            self._loaded[removals] = self._load(removals)
        return self._loaded[removals]

    def loaded_first(self, sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return these sizes in an order that loads as few models as possible."""
        return sorted(sizes, key=lambda removals: removals not in self._loaded)

    def _load(self, removals: tuple[int, ...]) -> SkippableModel:
        if not removals:
            return open_dense(self.architecture, self.placement, self.notify)
        if self.subject.recovered:
            return open_dense(self.subject.recovered, self.placement, self.notify)
        dense = None if self.one_at_a_time else self.without(()).model
        model = load_pruned(self._surgeries[removals], self.placement, self.notify, dense=dense)
        return SkippableModel(model, self.architecture.blocks_of(model))

    def require_unchanged(self) -> None:
        """Check that the models' files are those that were read at first.

        Raises:
            ModelError: they have changed, so what was measured may not be theirs.
        """
        for architecture in filter(None, (self.architecture, self.subject.recovered)):
            architecture.source.watch.require_unchanged()
