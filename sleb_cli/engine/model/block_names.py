"""The numbers of blocks in names of tensors and modules, before and after a removal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sleb_plugins.config_keys import Kept

PREDICTION = re.compile(r"(?:^|\.)mtp\w*\.(.*)", re.DOTALL)
"""The name of a tensor of a block for multi-token prediction, in files that do not number it after
the last block.
"""


@dataclass(frozen=True)
class BlockNumbering:
    """How weight files name a block's tensors: `prefix`, number, rest.

    `extra` numbers follow the last block's.
    """

    prefix: str
    extra: int = 0


@dataclass(frozen=True)
class BlockNames:
    """The names of a model's blocks in files, memory and settings, before and after a removal."""

    blocks_path: str
    numbering: BlockNumbering
    kept: Kept

    def block_of(self, name: str) -> int | None:
        """Return the block of a tensor or module by its name; None outside the blocks."""
        return self.split(name)[0]

    def split(self, name: str) -> tuple[int | None, str]:
        """Return the block of a tensor or module and its name there; None and its name outside."""
        match = self._in_block.fullmatch(name)
        return (int(match[2]), match[3].removeprefix(".")) if match else (None, name)

    def renamed(self, name: str) -> str | None:
        """Return a tensor's or module's name in the pruned model; None in a removed block."""
        match = self._in_block.fullmatch(name)
        if match is None:
            return name
        # Blocks for multi-token prediction, numbered after the last block, go with any removal:
        # they read hidden states of the whole model, and loaders would look for them under the old
        # numbers.
        number = self.kept.new_number.get(int(match[2]))
        return None if number is None else f"{match[1]}{number}{match[3]}"

    @cached_property
    def _in_block(self) -> re.Pattern[str]:
        # Files have a prefix of their own; settings may have the model's.
        prefixes = map(re.escape, [self.numbering.prefix, *path_suffixes(self.blocks_path)])
        return re.compile(rf"({'|'.join(prefixes)})(\d{{1,9}})((?:\..*)?)", re.DOTALL)


def find_block_numbering(names: Iterable[str], path: str, count: int) -> BlockNumbering | None:
    """Find how weight files number the `count` blocks under `path`; None if they do not."""
    lists: dict[str, list[int]] = defaultdict(list)
    for name in names:
        for match in re.finditer(r"\.(\d{1,9})(?=\.)", f".{name}"):
            lists[f".{name}"[1 : match.start() + 1]].append(int(match[1]))
    complete = {
        prefix: numbers for prefix, numbers in lists.items() if set(numbers) >= set(range(count))
    }
    # Older files may use another name: then the likeliest list of that length is taken.
    prefixes = [
        prefix for prefix in path_suffixes(path) if prefix in complete
    ] or _sort_by_likeness(complete, path)
    if not prefixes:
        return None
    numbers = set(complete[prefixes[0]])
    extra = len(numbers) - count
    return BlockNumbering(prefixes[0], extra) if numbers == set(range(count + extra)) else None


def path_suffixes(path: str) -> list[str]:
    """Return possible prefixes of tensors under `path`; a base model's files omit its start."""
    parts = path.split(".")
    return [".".join(parts[start:]) + "." for start in range(len(parts))]


def _sort_by_likeness(lists: dict[str, list[int]], path: str) -> list[str]:
    name = path.rpartition(".")[2]
    text = [prefix for prefix in lists if not re.search(r"vision|visual|audio|mtp", prefix)]
    # An encoder stands beside the text, or reads it.
    text = [prefix for prefix in text if "encoder" not in prefix] or text
    # Equal last name first, then least nested, then most tensors.
    return sorted(
        text,
        key=lambda prefix: (
            not prefix.endswith(f"{name}."),
            prefix.count("."),
            -len(lists[prefix]),
        ),
    )
