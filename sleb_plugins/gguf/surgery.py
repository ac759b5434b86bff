"""Remove blocks from a GGUF file: which entries and tensors remain, under which names, and no value recomputed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sleb_plugins.config_keys import Kept, kept_blocks, require_removable
from sleb_plugins.errors import ModelError, UnsupportedModelError
from sleb_plugins.gguf.file import ARRAY, Entry, GgufFile, Tensor, entry_of_integers, with_items, with_value
from sleb_plugins.gguf.llama_cpp import LEADING, NOT_PER_BLOCK, PER_BLOCK_PREFIX, require_same_kinds

PROVENANCE = "sleb.removed_blocks"
"""The key that keeps the removed blocks, in order, as numbered in the model from which nothing was removed yet."""

_BLOCK = re.compile(r"blk\.(\d+)(\..+)")


@dataclass(frozen=True)
class GgufSurgery:
    """The removal of blocks from one GGUF file.

    Attributes:
        file: the file.
        removals: the blocks to remove, numbered as in the file, in the order of their removal.
    """

    file: GgufFile
    removals: tuple[int, ...]

    @cached_property
    def kept(self) -> Kept:
        """The blocks that stay, those that predict further tokens (MTP) included: they come last."""
        return kept_blocks(stored_block_count(self.file), self.removals)

    def pruned(self) -> GgufFile:
        """Give the header of the pruned file; each tensor's values are still where they are in `file`."""
        if not self.removals:
            return self.file
        new_number = {old: new for new, old in enumerate(self.kept.blocks)}
        tensors: list[Tensor] = []
        for tensor in self.file.tensors:
            place = _BLOCK.fullmatch(tensor.name)
            if place is None:
                tensors.append(tensor)
            elif int(place[1]) in new_number:
                tensors.append(replace(tensor, name=f"blk.{new_number[int(place[1])]}{place[2]}"))
        entries = [self._entry(entry) for entry in self.file.entries if entry.key != PROVENANCE]
        entries.append(entry_of_integers(PROVENANCE, self.all_removals, self.file.order))
        return replace(self.file, entries=tuple(entries), tensors=tuple(tensors))

    @property
    def all_removals(self) -> list[int]:
        """The removed blocks, those of earlier surgeries first, as numbered before all of them."""
        earlier: list[int] = self.file.get(PROVENANCE) or []
        original = stored_block_count(self.file) + len(earlier)
        still_there = [block for block in range(original) if block not in earlier]
        return earlier + [still_there[block] for block in self.removals]

    def _entry(self, entry: Entry) -> Entry:
        """Give an entry as it is in the pruned file."""
        file, count = self.file, stored_block_count(self.file)
        own = entry.key.removeprefix(f"{file.architecture}.")
        if own == entry.key and not entry.key.startswith(PER_BLOCK_PREFIX):
            return entry
        if own == "block_count":
            return with_value(entry, len(self.kept.blocks), file.order)
        if own in LEADING:
            return with_value(entry, self.kept.below(int(file.own(own))), file.order)
        if entry.type == ARRAY and own not in NOT_PER_BLOCK:
            length = len(file.get(entry.key))
            # Some lists leave out the blocks at the end that predict further tokens.
            if length in (count, block_count(file)):
                return with_items(entry, [block for block in self.kept.blocks if block < length], file.order)
        return entry


def stored_block_count(file: GgufFile) -> int:
    """Give how many blocks the file holds, those that predict further tokens (MTP) included, as `block_count` does."""
    return int(file.own("block_count"))


def block_count(file: GgufFile) -> int:
    """Give how many blocks the model has: without those that predict further tokens."""
    return stored_block_count(file) - int(file.own("nextn_predict_layers") or 0)


def plan_gguf_surgery(file: GgufFile, removals: Iterable[int]) -> GgufSurgery:
    """Check the blocks against the file, and the file against what llama.cpp will make of it.

    Raises:
        UsageError: a block is named twice, does not exist, or none would remain.
        ModelError: the file holds no model, or its tensors are not those of so many blocks.
        UnsupportedModelError: the architecture does not let these blocks go.
    """
    blocks = tuple(removals)
    _require_blocks(file)
    count = block_count(file)
    predicting = stored_block_count(file) - count
    further = f", and {predicting} that predict further tokens, which stay" if predicting else ""
    require_removable(blocks, count, str(file.path), further=further)
    surgery = GgufSurgery(file, blocks)
    if blocks:
        require_same_kinds(file, count, tuple(block for block in surgery.kept.blocks if block < count))
    return surgery


def _require_blocks(file: GgufFile) -> None:
    kind: Any = file.get("general.type") or "model"
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} is no model: its general.type is {kind!r}.", hint="Name the file that holds the blocks."
        )
    stored = file.own("block_count")
    found = {int(place[1]) for tensor in file.tensors if (place := _BLOCK.fullmatch(tensor.name))}
    if not isinstance(stored, int) or not found or found != set(range(stored)):
        raise ModelError(
            f"{file.path} says {stored} blocks ({file.architecture}.block_count) and has tensors of {len(found)}.",
            hint="Name a GGUF file of a whole decoder-only language model.",
        )
