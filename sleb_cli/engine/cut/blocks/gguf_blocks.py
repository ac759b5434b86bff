"""The cut of blocks of a GGUF file: the entries and tensors that remain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleb_cli.engine.cut.blocks.block_cut import BlockCut, plan_blocks
from sleb_cli.engine.cut.protocol import GgufCut
from sleb_cli.engine.gguf.block_rules import LEADING, NOT_PER_BLOCK, PER_BLOCK_PREFIX
from sleb_cli.engine.gguf.blocks import block_count, stored_block_count
from sleb_cli.engine.gguf.file import ARRAY, Entry, GgufFile, with_items, with_value
from sleb_cli.engine.gguf.removed_parts import REMOVED_BLOCKS, with_removals
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import BlockNames, BlockNumbering
from sleb_plugins.config_keys import Kept, kept_blocks


@dataclass(frozen=True)
class GgufBlockCut(GgufCut):
    """The removal of at least one block, numbered as in the file, in the order of their removal."""

    removals: tuple[int, ...]

    def for_model(self, architecture: Architecture) -> BlockCut:
        """Return the removal of these blocks from the model that transformers reads in the file."""
        return plan_blocks(architecture, self.removals)

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header without these blocks; blocks for multi-token prediction stay."""
        count = stored_block_count(file)
        kept = kept_blocks(count, self.removals)
        names = BlockNames("blk", BlockNumbering("blk."), kept)
        tensors = []
        for tensor in file.tensors:
            name = names.renamed(tensor.name)
            if name is not None:
                tensors.append(replace(tensor, name=name))
        entries = [_pruned_entry(file, entry, kept) for entry in file.entries]
        pruned = replace(file, entries=tuple(entries), tensors=tuple(tensors))
        return with_removals(pruned, REMOVED_BLOCKS, count, self.removals)


def _pruned_entry(file: GgufFile, entry: Entry, kept: Kept) -> Entry:
    key = entry.key.removeprefix(f"{file.architecture}.")
    if key == entry.key and not entry.key.startswith(PER_BLOCK_PREFIX):
        return entry
    if key == "block_count":
        return with_value(entry, len(kept.blocks))
    if key in LEADING:
        return with_value(entry, kept.below(file.count(key) or 0))
    if entry.type == ARRAY and key not in NOT_PER_BLOCK:
        length = len(file.get(entry.key))
        # Some lists leave out the blocks for multi-token prediction at the end.
        if length in (kept.count, block_count(file)):
            return with_items(entry, [block for block in kept.blocks if block < length])
    return entry
