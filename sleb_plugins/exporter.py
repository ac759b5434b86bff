"""How a list of removed blocks is written down for another tool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar


@dataclass(frozen=True)
class Pruning:
    """A model and the blocks it loses, numbered from 0 as in the original.

    Attributes:
        model: where other tools find the model: a hub id or a folder.
        revision: the hub commit, or None for a folder.
        dtype: the data type of the checkpoint's weights, as in "bfloat16".
        blocks: how many blocks the original has.
        removals: the removed blocks in the order of their removal.
    """

    model: str
    revision: str | None
    dtype: str
    blocks: int
    removals: tuple[int, ...]

    @property
    def kept_ranges(self) -> list[tuple[int, int]]:
        """The kept blocks as half-open ranges, in order: blocks 0 to 4 and 6 to 9 are (0, 5), (6, 10)."""
        cuts = [-1, *sorted(self.removals), self.blocks]
        return [(low + 1, high) for low, high in pairwise(cuts) if high > low + 1]


class Exporter(ABC):
    """One format of `sleb export --to NAME`."""

    name: ClassVar[str]
    description: ClassVar[str] = ""

    @abstractmethod
    def document(self, pruning: Pruning) -> Any:
        """Say it as data that JSON can hold (what `--json` prints)."""

    @abstractmethod
    def render(self, pruning: Pruning) -> str:
        """Say it as the text that the other tool reads, ending in a newline."""
