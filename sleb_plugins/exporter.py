"""How a removal of blocks is handed to another tool: as text, or as files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Pruning:
    """A model and the blocks it loses, numbered from 0 as in the original.

    Attributes:
        model: where other tools find the model: a hub id or a folder.
        revision: the hub commit, or None for a folder.
        dtype: the data type of the checkpoint's weights, as in "bfloat16".
        blocks: how many blocks the original has.
        removals: the removed blocks in the order of their removal.
        source_file: a GGUF file of the model: what `--source` names, or else the model itself where it is one.
    """

    model: str
    revision: str | None
    dtype: str
    blocks: int
    removals: tuple[int, ...]
    source_file: Path | None = None

    @property
    def kept_ranges(self) -> list[tuple[int, int]]:
        """The kept blocks as half-open ranges, in order: blocks 0 to 4 and 6 to 9 are (0, 5), (6, 10)."""
        cuts = [-1, *sorted(self.removals), self.blocks]
        return [(low + 1, high) for low, high in pairwise(cuts) if high > low + 1]


class Exporter(ABC):
    """One format of `sleb export --to NAME` that is a text.

    Attributes:
        uses_source: whether it looks at `source_file`; elsewhere `--source` is refused.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    uses_source: ClassVar[bool] = False

    @abstractmethod
    def document(self, pruning: Pruning) -> Any:
        """Say it as data that JSON can hold (what `--json` prints)."""

    @abstractmethod
    def render(self, pruning: Pruning) -> str:
        """Say it as the text that the other tool reads, ending in a newline."""


class ArtifactWriter(Protocol):
    """What the engine offers those who write files. Each result is there whole and proven, or not at all."""

    def write_checkpoint(self, output: Path | None, check: Callable[[Path], None] | None = None) -> Path:
        """Write the pruned checkpoint as `sleb apply` does, and give its folder; None names it after the model.

        `check` sees the finished folder before it is delivered; what it raises keeps it back.
        """

    def write_gguf(self, source: Path, output: Path | None) -> Path:
        """Remove the blocks from a GGUF file of the model as `sleb apply --to-gguf` does, and give the new file."""


class FileExporter(ABC):
    """One format of `sleb export --to NAME` that is a file or a folder; attributes as those of `Exporter`."""

    name: ClassVar[str]
    description: ClassVar[str] = ""
    uses_source: ClassVar[bool] = False

    @abstractmethod
    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write it to `output`, or to a place named after the model.

        What the writer writes is shown by itself.

        Returns:
            Further lines for the user: how to start the other tool, or what was written without the writer.
        """
