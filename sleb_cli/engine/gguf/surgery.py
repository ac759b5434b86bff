"""Remove blocks from a GGUF file: which entries and tensors remain, and under which names. It computes no values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sleb_cli.engine.gguf.file import ARRAY, Entry, GgufFile, GgufTensor, entry_of_integers, with_items, with_value
from sleb_cli.engine.gguf.llama_cpp import LEADING, NOT_PER_BLOCK, PER_BLOCK_PREFIX, require_same_kinds
from sleb_cli.engine.gguf.vocabulary import cut_vocabulary, plan_vocabulary
from sleb_cli.engine.vocabulary import Vocabulary
from sleb_plugins.config_keys import Kept, kept_blocks, require_removable
from sleb_plugins.errors import ModelError, UnsupportedModelError

PROVENANCE = "sleb.removed_blocks"
"""The key that records the removed blocks in order, numbered as in the model before any removal."""

_BLOCK = re.compile(r"blk\.([0-9]{1,9})(\..+)")


@dataclass(frozen=True)
class GgufSurgery:
    """The removal of blocks, and maybe of tokens, from one GGUF file.

    Attributes:
        file: the file.
        removals: the blocks to remove, numbered as in the file, in the order of their removal.
        vocabulary: the tokens that stay; None if all do.
    """

    file: GgufFile
    removals: tuple[int, ...]
    vocabulary: Vocabulary | None = None

    @cached_property
    def kept(self) -> Kept:
        """The kept blocks, including those for multi-token prediction, which come last."""
        return kept_blocks(stored_block_count(self.file), self.removals)

    def pruned(self) -> GgufFile:
        """Return the header of the pruned file; the offsets of its tensors are those in `file`."""
        pruned = self._without_blocks() if self.removals else self.file
        return cut_vocabulary(pruned, self.vocabulary) if self.vocabulary else pruned

    def _without_blocks(self) -> GgufFile:
        tensors: list[GgufTensor] = []
        for tensor in self.file.tensors:
            place = _BLOCK.fullmatch(tensor.name)
            if place is None:
                tensors.append(tensor)
            elif (number := self.kept.new_number.get(int(place[1]))) is not None:
                tensors.append(replace(tensor, name=f"blk.{number}{place[2]}"))
        entries = [self._entry(entry) for entry in self.file.entries if entry.key != PROVENANCE]
        entries.append(entry_of_integers(PROVENANCE, self.all_removals))
        return replace(self.file, entries=tuple(entries), tensors=tuple(tensors))

    @property
    def all_removals(self) -> list[int]:
        """The removed blocks, those of earlier removals first, numbered as in the model before any removal."""
        said: Any = self.file.get(PROVENANCE)
        if said is None:
            return list(self.removals)
        count = stored_block_count(self.file)
        earlier = said if isinstance(said, list) and all(type(block) is int for block in said) else [-1]
        remaining = sorted(set(range(count + len(earlier))).difference(earlier))
        if len(remaining) != count:  # a block is named twice or never existed
            raise ModelError(
                f"{PROVENANCE} of {self.file.path} is not a list of removed blocks.",
                hint="Prune the original model instead.",
            )
        return [*earlier, *(remaining[block] for block in self.removals)]

    def _entry(self, entry: Entry) -> Entry:
        """Return an entry as in the pruned file."""
        file, count = self.file, stored_block_count(self.file)
        own = entry.key.removeprefix(f"{file.architecture}.")
        if own == entry.key and not entry.key.startswith(PER_BLOCK_PREFIX):
            return entry
        if own == "block_count":
            return with_value(entry, len(self.kept.blocks))
        if own in LEADING:
            return with_value(entry, self.kept.below(file.count(own) or 0))
        if entry.type == ARRAY and own not in NOT_PER_BLOCK:
            length = len(file.get(entry.key))
            # Some lists leave out the blocks for multi-token prediction at the end.
            if length in (count, block_count(file)):
                return with_items(entry, [block for block in self.kept.blocks if block < length])
        return entry


def stored_block_count(file: GgufFile) -> int:
    """Return the file's `block_count`, which includes the blocks for multi-token prediction."""
    return file.count("block_count") or 0


def block_count(file: GgufFile) -> int:
    """Return how many blocks the model has, without those for multi-token prediction."""
    return stored_block_count(file) - (file.count("nextn_predict_layers") or 0)


def plan_gguf_surgery(file: GgufFile, removals: Iterable[int], scripts: Sequence[str] = ()) -> GgufSurgery:
    """Return the removal of these blocks, and of tokens of other scripts if any is named.

    They are checked against the file, and against how llama.cpp loads the result.

    Raises:
        UsageError: a block is named twice or does not exist, or no block would remain.
        ModelError: the file holds no model, or its tensors do not match its number of blocks.
        UnsupportedModelError: these blocks cannot be removed from this architecture.
    """
    blocks = tuple(removals)
    require_blocks(file)
    count = block_count(file)
    predicting = stored_block_count(file) - count
    further = f", and {predicting} for multi-token prediction, which stay" if predicting else ""
    require_removable(blocks, count, str(file.path), further=further)
    surgery = GgufSurgery(file, blocks)
    if blocks:
        require_same_kinds(file, count, tuple(block for block in surgery.kept.blocks if block < count))
    return replace(surgery, vocabulary=plan_vocabulary(file, scripts)) if scripts else surgery


def require_blocks(file: GgufFile) -> None:
    """Check that a file holds a model, with tensors of as many blocks as it says.

    Raises:
        ModelError: it does not.
    """
    kind: Any = file.get("general.type") or "model"
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} is not a model: its general.type is {kind!r}.", hint="Name the file that holds the blocks."
        )
    stored = file.count("block_count")
    found = {int(place[1]) for tensor in file.tensors if (place := _BLOCK.fullmatch(tensor.name))}
    if not found or len(found) != stored or max(found) != stored - 1:
        raise ModelError(
            f"{file.path} says {stored} blocks ({file.architecture}.block_count), but has tensors of {len(found)}.",
            hint="Name a GGUF file of a complete decoder-only language model.",
        )
