"""The entries and tensors of a GGUF file that remain after a removal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from sleb_cli.engine.cut.blocks.gguf_blocks import GgufBlockCut
from sleb_cli.engine.cut.kinds import CUTS
from sleb_cli.engine.cut.protocol import GgufCut
from sleb_cli.engine.gguf.block_rules import require_same_kinds
from sleb_cli.engine.gguf.blocks import block_count, require_blocks, stored_block_count
from sleb_cli.engine.gguf.file import GgufFile
from sleb_plugins.config_keys import kept_blocks, require_removable


@dataclass(frozen=True)
class GgufSurgery:
    """The cuts of one GGUF file, in order."""

    file: GgufFile
    cuts: tuple[GgufCut, ...] = ()

    @cached_property
    def removals(self) -> tuple[int, ...]:
        """The removed blocks, numbered as in the file, in the order of their removal."""
        return tuple(block for cut in self.cuts for block in cut.removals)

    def pruned(self) -> GgufFile:
        """Return the header of the pruned file; its tensors have their offsets in `file`."""
        file = self.file
        for cut in self.cuts:
            file = cut.header(file)
        return file


def plan_gguf_surgery(
    file: GgufFile, removals: Iterable[int], other_cuts: Mapping[str, Any] = MappingProxyType({})
) -> GgufSurgery:
    """Plan the removal of these blocks and the other cuts, the values of options in `CUTS`.

    All are checked against the file, and against how llama.cpp loads the result.
    """
    blocks = tuple(removals)
    require_blocks(file)
    count = block_count(file)
    stored = stored_block_count(file)
    further = ""
    if stored > count:
        further = f", and {stored - count} for multi-token prediction, which stay"
    require_removable(blocks, count, str(file.path), further=further)
    if blocks:
        require_same_kinds(file, count, kept_blocks(count, blocks).blocks)
    cuts: list[GgufCut] = []
    if blocks:
        cuts.append(GgufBlockCut(blocks))
    for option, value in other_cuts.items():
        cuts.append(CUTS[option].plan_gguf(file, value))
    return GgufSurgery(file, tuple(cuts))
