"""Which tensors and settings remain when blocks are removed, and under which names. Nothing here reads a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.quantization import prune_quantization
from sleb_plugins import UnsupportedModelError, UsageError

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
    def new_number(self) -> dict[int, int]:
        """From a kept block's number in the original to its number in the pruned model."""
        kept = (block for block in range(self.architecture.block_count) if block not in self.removed)
        return {old: new for new, old in enumerate(kept)}

    def prune_config(self) -> dict[str, Any]:
        """Give `config.json` of the pruned model: the count, and every list with one value per block.

        Lists are taken from the config as transformers understands it, so that a pattern which
        `config.json` leaves to a default or a period becomes an explicit list.
        """
        pruned = dict(self.architecture.source.raw_config)
        adapter = self.architecture.adapter
        pruned[adapter.count_key] = len(self.new_number)
        for key in adapter.per_block_keys:
            values = getattr(self.architecture.config, key, None)
            if values is not None:
                pruned[key] = [values[block] for block in self.new_number]
        return prune_quantization(pruned, self)

    def prune_tensors(self, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Drop the tensors of removed blocks and give the others the names they have in the pruned model."""
        for name, tensor in tensors:
            place = self.locate(name)
            if place is None:
                yield name, tensor
            elif place.block in self.new_number:
                yield f"{place.prefix}{self.new_number[place.block]}{place.suffix}", tensor

    def locate(self, name: str) -> TensorPlace | None:
        """Say which block a tensor belongs to by its name, or None for one outside of the blocks."""
        for prefix in self._prefixes:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdigit():
                return TensorPlace(prefix, int(number), dot + rest)
        return None

    @cached_property
    def _prefixes(self) -> list[str]:
        """What block tensors start with; checkpoints of a bare base model leave the first part out."""
        parts = self.architecture.adapter.blocks_path.split(".")
        return [".".join(parts[start:]) + "." for start in range(len(parts))]


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's name, taken apart around the number of its block."""

    prefix: str
    block: int
    suffix: str


def plan_surgery(architecture: Architecture, removals: Iterable[int]) -> Surgery:
    """Check the blocks against the model.

    Raises:
        UsageError: a block is named twice, does not exist, or none would remain.
        UnsupportedModelError: the weight files do not name every block, so that none can be dropped safely.
    """
    blocks = tuple(removals)
    count = architecture.block_count
    repeated = sorted({block for block in blocks if blocks.count(block) > 1})
    if repeated:
        raise UsageError(f"Block {repeated[0]} is named twice.", hint="Name each block once.")
    outside = [block for block in blocks if not 0 <= block < count]
    if outside:
        raise UsageError(
            f"There is no block {outside[0]}: {architecture.source.id} has {count} blocks, 0 to {count - 1}.",
            hint="Blocks are numbered from 0, as in the original model.",
        )
    if len(blocks) == count:
        raise UsageError(f"All {count} blocks would go.", hint="Keep at least one.")
    surgery = Surgery(architecture, blocks)
    names = architecture.source.weights.tensor_names()
    found = {place.block for place in map(surgery.locate, names) if place}
    if found != set(range(count)):
        raise UnsupportedModelError(
            f"The weight files of {architecture.source.id} do not keep {count} blocks under "
            f"{architecture.adapter.blocks_path}.",
            hint="Load the model with transformers and save it again, then try with that copy.",
        )
    return surgery
