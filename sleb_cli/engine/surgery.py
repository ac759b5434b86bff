"""Which tensors and settings remain when blocks are removed, and under which names. Nothing here reads a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache

from sleb_cli.engine.anatomy import anatomy, block_changes, frame_changes
from sleb_cli.engine.architecture import Architecture, ways_to_say
from sleb_cli.engine.foreign import verdict
from sleb_cli.engine.quantization import prune_quantization
from sleb_plugins import ModelError, UnsupportedModelError
from sleb_plugins.layout import (
    OBSTACLES,
    PERIODS,
    PREDICTION_BLOCKS,
    READINGS,
    REWRITINGS,
    Kept,
    by_block,
    kept_blocks,
    means_blocks,
    require_removable,
    sliced_axis,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Surgery:
    """The removal of blocks from one model. The same object serves files on disk and models in memory.

    Attributes:
        architecture: the model.
        removals: the blocks to remove, numbered as in the original, in the order of their removal.
    """

    architecture: Architecture
    removals: tuple[int, ...]

    @property
    def removed(self) -> frozenset[int]:
        """The removed blocks, without their order."""
        return frozenset(self.removals)

    @cached_property
    def kept(self) -> Kept:
        """The blocks that stay."""
        return kept_blocks(self.architecture.block_count, self.removals)

    @cached_property
    def new_number(self) -> dict[int, int]:
        """From a kept block's number in the original to its number in the pruned model."""
        return {old: new for new, old in enumerate(self.kept.blocks)}

    def prune_config(self) -> dict[str, Any]:
        """Give `config.json` of the pruned model: the count, and every setting that speaks of single blocks.

        Settings are taken from the config as transformers understands it, so that a pattern which
        `config.json` leaves to a default or a period becomes an explicit list.
        """
        raw = dict(self.architecture.source.raw_config)
        if not self.removed:
            return raw
        inner = self.architecture.text_key
        text = dict(raw.get(inner) or {}) if inner else raw
        text |= self._pruned_settings(text)
        if self.architecture.numbering.extra:
            text |= {key: 0 for key in PREDICTION_BLOCKS if text.get(key)}
        return prune_quantization(raw | {inner: text} if inner else text, self)

    def _pruned_settings(self, written: dict[str, Any]) -> dict[str, Any]:
        config, adapter, kept = self.architecture.text_config, self.architecture.adapter, self.kept
        understood = config.to_dict()
        settings: dict[str, Any] = {}
        for key in dict.fromkeys((*written, *understood)):
            value = understood.get(key, written.get(key))
            reading = adapter.config_keys.get(key) or READINGS.get(key)
            if reading is None and means_blocks(key, value, kept.count):
                reading = by_block
            if reading is None or value is None or isinstance(value, bool):
                continue
            pruned = reading(value, kept)
            if key in written or pruned != value or isinstance(value, list):
                settings[key] = pruned
        for key, rewrite in REWRITINGS.items():
            if key in understood and key not in adapter.config_keys:
                settings |= rewrite({name: getattr(config, name, None) for name in (*understood, *written)}, kept)
        aliases = [alias for alias, name in config.attribute_map.items() if name == adapter.count_key]
        counts = [adapter.count_key, *(alias for alias in aliases if alias in written)]
        return settings | dict.fromkeys(counts, len(kept.blocks))

    def prune_tensors(self, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Drop the tensors of removed blocks and give the others the names they have in the pruned model.

        With any block, those for multi-token prediction that are numbered on after the last one go too: they read
        hidden states of the whole model, and what loads the checkpoint would look for them under the old number.
        """
        for name, tensor in tensors:
            place = self.locate(name)
            if place is None or not self.removed:
                yield name, tensor
            elif place.block in self.new_number:
                yield f"{place.prefix}{self.new_number[place.block]}{place.suffix}", tensor

    def cut(self, name: str) -> Cut | None:
        """Say what of a tensor stays that holds a slice for each block; None for one that is kept or dropped whole."""
        axis = sliced_axis(name)
        return Cut(axis, self.kept) if axis is not None and self.removed else None

    def locate(self, name: str) -> TensorPlace | None:
        """Say which block a tensor belongs to by its name, or None for one outside of the blocks."""
        for prefix in self._prefixes:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdigit():
                return TensorPlace(prefix, int(number), dot + rest)
        return None

    @cached_property
    def _prefixes(self) -> list[str]:
        """What names of block tensors start with: in the files, and in the model, whose names settings may use."""
        return list(
            dict.fromkeys([self.architecture.numbering.prefix, *ways_to_say(self.architecture.adapter.blocks_path)])
        )

    def obstacle(self) -> str | None:
        """Say in a clause what makes this removal wrong for the blocks that stay, or None where nothing does.

        The pruned model is built without weights, and its blocks are compared with what they were.

        Raises:
            UnsupportedModelError: the weight files do not name every block.
        """
        before, kept = self.architecture, self.kept
        _ = before.numbering
        for key, (applies, why) in OBSTACLES.items():
            if applies(getattr(before.text_config, key, None) or []):
                return f"{why} ({key})"
        try:
            config = before.read_config(self.prune_config())
            skeleton = before.build(config)
            blocks = before.blocks_of(skeleton)
        except ModelError as error:
            return error.message.rstrip(".")
        if len(blocks) != len(kept.blocks):
            return f"with {before.adapter.count_key} {len(kept.blocks)} the model has {len(blocks)} blocks"
        for new, old in enumerate(kept.blocks):
            changes = block_changes(before.block_anatomies[old], anatomy(blocks[new]), old, kept)
            if changes:
                return f"in block {old}, {changes[0]}{self._by_period()}"
        if changes := frame_changes(before.frame_anatomy, before.frame_of(skeleton), kept):
            return f"outside of the blocks, {changes[0]}"
        return None if _cache_fault(before.config) else _cache_fault(config)

    def _by_period(self) -> str:
        config = self.architecture.text_config
        found = {key: getattr(config, key, None) for key in PERIODS}
        said = [f"{key} = {value}" for key, value in found.items() if isinstance(value, int) and value > 1]
        return f" (the config says it by period: {', '.join(said)})" if said else ""


@dataclass(frozen=True)
class Cut:
    """The slices of kept blocks, along one axis of a tensor: Gemma 3n's embeddings for each block."""

    axis: int
    kept: Kept

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Give the shape of what stays."""
        width = shape[self.axis] // self.kept.count * len(self.kept.blocks)
        return (*shape[: self.axis], width, *shape[self.axis + 1 :])

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a tensor in memory."""
        width = tensor.shape[self.axis] // self.kept.count
        slices = torch.split(tensor, width, self.axis)
        return torch.cat([slices[block] for block in self.kept.blocks], self.axis)

    def of_bytes(self, parts: Iterable[memoryview], shape: Sequence[int], size: int) -> Iterator[memoryview]:
        """Cut a tensor of this shape and so many bytes as they come, whatever they mean."""
        row = size // math.prod(shape[: self.axis])
        rest = bytearray()
        for part in parts:
            rest += part
            whole = len(rest) // row * row
            if whole:
                rows = np.frombuffer(bytes(rest[:whole]), np.uint8).reshape(-1, self.kept.count, row // self.kept.count)
                yield rows[:, self.kept.blocks].reshape(-1).data
                del rest[:whole]


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's name, taken apart around the number of its block."""

    prefix: str
    block: int
    suffix: str


def _cache_fault(config: Any) -> str | None:
    """Say what a KV cache for this config does not bear: most cannot be without any attention block."""
    try:
        with verdict(lambda words: ModelError(f"the KV cache would not work: {words}", hint="")):
            DynamicCache(config=config.get_text_config(decoder=True)).get_seq_length()
    except ModelError as error:
        return error.message
    return None


def plan_surgery(architecture: Architecture, removals: Iterable[int]) -> Surgery:
    """Check the blocks against the model.

    Raises:
        UsageError: a block is named twice, does not exist, or none would remain.
        UnsupportedModelError: the weight files do not name every block, so that none can be dropped safely; or the
            blocks that stay would not be what they were.
    """
    blocks = tuple(removals)
    require_removable(blocks, architecture.block_count, architecture.source.id)
    surgery = Surgery(architecture, blocks)
    if blocks and (obstacle := surgery.obstacle()):
        names = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {', '.join(map(str, sorted(blocks)))}"
        raise UnsupportedModelError(
            f"{architecture.source.id} ({architecture.config.model_type}) cannot go without {names}: {obstacle}.",
            hint="Remove other blocks; docs/families.md says what each family allows.",
        )
    return surgery
