"""The dense and the pruned models of an evaluation, and the cache of what was measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError

from sleb_cli.engine.device import dtype_name, free_memory
from sleb_cli.engine.door.subject import sizes
from sleb_cli.engine.environment import chip_name
from sleb_cli.engine.files.cache import KeptFiles
from sleb_cli.engine.forward.placement import Placement, open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import other_plugins
from sleb_cli.requests import EvalRequest
from sleb_cli.version import __version__

T = TypeVar("T")

# Raise it when the numbers change but the key does not, between two versions of sleb.
VERSION = 2


class Models:
    """The dense model and one for each size, loaded when first needed; they share weights if they can.

    What is measured, such as the scores of a model on a few windows of a text or on a task, is cached under everything
    that the numbers depend on, so an evaluation that was interrupted or is repeated finds it again.
    """

    def __init__(
        self, subject: Subject, request: EvalRequest, placement: Placement, group: ProcessGroup, notify: Notify
    ) -> None:
        self.architecture, self.recovered = subject.architecture, subject.recovered
        self.placement, self.group, self.notify = placement, group, notify
        self._surgeries = {surgery.removals: surgery for surgery in sizes(subject, request)}
        self.sizes: list[tuple[int, ...]] = [(), *self._surgeries]
        """The removals of each model; the dense one is first, and has none."""
        self.is_single = self.architecture.is_quantized or placement.device_map is not None or placement.stream
        """Whether only one model is open at a time: no other can share packed, spread or streamed weights with it."""
        self._loaded: dict[tuple[int, ...], SkippableModel] = {}
        self._fresh = request.fresh
        self._files = KeptFiles("evaluations", "Results are", notify, can_write=group.is_main)
        self._common = {
            "version": VERSION,
            "sleb": __version__,
            "model": self.architecture.source.content_hash,
            "dtype": dtype_name(placement.dtype),
            "device": placement.device.type,
            "chip": chip_name(placement.device),
            "matmul": torch.get_float32_matmul_precision(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            **{plugin.package: plugin.version for plugin in other_plugins()},  # which may say how a family is pruned
        }

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
            return open_dense(self.architecture, self.placement, self.notify)
        if self.recovered:
            return open_dense(self.recovered, self.placement, self.notify)
        surgery, place = self._surgeries[removals], self.placement
        dense = None if self.is_single else self.without(()).model
        model = load_pruned(surgery, place.dtype, place.device, self.notify, dense=dense, device_map=place.device_map)
        return SkippableModel(model, self.architecture.blocks_of(model))

    def cached(self, removals: tuple[int, ...], load: Callable[[bytes], T], **what: Any) -> T | None:
        """Return what was measured on this model, if it is in the cache and whole."""
        content = None if self._fresh else self._files.read(self._key(removals, what))
        try:
            return None if content is None else load(content)
        except (SafetensorError, ValueError):
            return None

    def cache(self, removals: tuple[int, ...], content: bytes, **what: Any) -> None:
        """Write what was measured on this model, if the cache can be written.

        Raises:
            ModelError: the model's files have changed, so it may not be theirs.
        """
        for architecture in filter(None, (self.architecture, self.recovered)):
            architecture.source.watch.require_unchanged()
        self._files.write(self._key(removals, what), content)

    def _key(self, removals: tuple[int, ...], what: Mapping[str, Any]) -> dict[str, Any]:
        # The order of removal does not matter.
        named = {"removals": ",".join(map(str, sorted(removals)))}
        if removals and self.recovered:
            named["recovered"] = self.recovered.source.content_hash
        return self._common | named | dict(what)
