"""How names of tensors and modules speak of blocks: where their numbers stand, and which numbers they get."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from sleb_plugins.config_keys import Kept

T = TypeVar("T")


@dataclass(frozen=True)
class Numbering:
    """How the weight files name the tensors of blocks: `prefix`, number, rest; `extra` numbers come after the last."""

    prefix: str
    extra: int = 0


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's name, taken apart around the number of its block."""

    prefix: str
    block: int
    suffix: str


@dataclass(frozen=True)
class BlockNames:
    """The names of one model's blocks in weight files, in memory and in settings, before and after a removal.

    Attributes:
        blocks_path: where the model in memory keeps its blocks.
        numbering: how the weight files number them.
        kept: the blocks that stay.
    """

    blocks_path: str
    numbering: Numbering
    kept: Kept

    @cached_property
    def new_number(self) -> dict[int, int]:
        """From a kept block's number in the original to its number in the pruned model."""
        return {old: new for new, old in enumerate(self.kept.blocks)}

    def locate(self, name: str) -> TensorPlace | None:
        """Say which block a tensor belongs to by its name, or None for one outside of the blocks."""
        for prefix in self._prefixes:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdigit():
                return TensorPlace(prefix, int(number), dot + rest)
        return None

    def prune(self, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Drop what belongs to removed blocks and give the rest the names that they have in the pruned model.

        With any block, those for multi-token prediction that are numbered on after the last one go too: they read
        hidden states of the whole model, and what loads the checkpoint would look for them under the old number.
        """
        removes = len(self.kept.blocks) < self.kept.count
        for name, value in named:
            place = self.locate(name)
            if place is None or not removes:
                yield name, value
            elif place.block in self.new_number:
                yield f"{place.prefix}{self.new_number[place.block]}{place.suffix}", value

    @cached_property
    def _prefixes(self) -> list[str]:
        """What names of block tensors start with: in the files, and in the model, whose names settings may use."""
        return list(dict.fromkeys([self.numbering.prefix, *path_suffixes(self.blocks_path)]))


def number_blocks(names: Iterable[str], path: str, count: int) -> Numbering | None:
    """Find out how weight files name the blocks that the model keeps under `path`, or None where they do not.

    Files of the base model alone leave out the path's first parts, and older ones call the list otherwise: then the
    one other list of so many is taken, and what it is called need only be the same throughout.
    """
    lists: dict[str, list[int]] = defaultdict(list)
    for name in names:
        for match in re.finditer(r"\.(\d+)(?=\.)", f".{name}"):
            lists[f".{name}"[1 : match.start() + 1]].append(int(match[1]))
    whole = {prefix: numbers for prefix, numbers in lists.items() if set(numbers) >= set(range(count))}
    found = [way for way in path_suffixes(path) if way in whole] or _most_alike(whole, path.rpartition(".")[2])
    if not found:
        return None
    numbers = set(whole[found[0]])
    extra = len(numbers) - count
    return Numbering(found[0], extra) if numbers == set(range(count + extra)) else None


def path_suffixes(path: str) -> list[str]:
    """Give what names of tensors under `path` may start with; files of a base model leave out the first parts."""
    parts = path.split(".")
    return [".".join(parts[start:]) + "." for start in range(len(parts))]


def _most_alike(lists: dict[str, list[int]], name: str) -> list[str]:
    """Put lists of the same last name first, then those with more tensors; leave out what sees and hears."""
    own = [prefix for prefix in lists if not re.search(r"vision|visual|audio|encoder|mtp", prefix)]
    return sorted(own, key=lambda prefix: (not prefix.endswith(f"{name}."), prefix.count("."), -len(lists[prefix])))
