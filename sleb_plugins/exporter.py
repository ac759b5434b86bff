"""Export formats: hand a removal of blocks to another tool, or to a reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Pruning:
    """A model and the blocks it loses, numbered from 0 as in the original.

    Attributes:
        model: where other tools find the model: a Hub id or a folder.
        revision: the Hub commit, or None for a folder.
        dtype: the data type of the checkpoint's weights, such as "bfloat16".
        blocks: how many blocks the original has.
        removals: the removed blocks in the order of their removal.
        source_file: a GGUF file of the model: the value of `--source`, or the model itself if it is
            a GGUF file.
        plan_file: the plan's file as the user named it, or None if the blocks were named by hand.
        plan: the plan as in its JSON file, without local folders, so that it may be published; None
            if the blocks were named by hand, or if `evaluation` compares two models.
        evaluation: what `sleb eval` measured of the plan's sizes, as in its JSON file, if it did;
            likewise published.
        benchmark: what `sleb bench` measured of the plan's sizes, as in its JSON file, if it did;
            likewise published.
        others: the further plans that were named, for formats of `several`.
        output: the file that `-o` names, whose ending may say in which form it is wanted.
    """

    model: str
    revision: str | None
    dtype: str
    blocks: int
    removals: tuple[int, ...]
    source_file: Path | None = None
    plan_file: Path | None = None
    plan: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None
    others: tuple[Pruning, ...] = ()
    output: Path | None = None

    @property
    def kept_ranges(self) -> list[tuple[int, int]]:
        """The remaining blocks as half-open ranges, in order: blocks 0 to 4 and 6 to 9 are (0, 5),
        (6, 10).
        """
        cuts = [-1, *sorted(self.removals), self.blocks]
        return [(low + 1, high) for low, high in pairwise(cuts) if high > low + 1]


class Exporter(ABC):
    """A format of `sleb export --to NAME`.

    Attributes:
        name: its name on the command line.
        description: one line for `sleb plugins`.
        ending: how its file is named after the plan without `-o`: ".report.html"; if empty, the
            text is printed.
        only_counts: whether the other tool changes the number of blocks, and no other setting of a
            checkpoint; models of which that is not enough are refused.
        uses_source: whether it uses `source_file`; otherwise `--source` is refused.
        needs_model: whether it needs the model. Otherwise it describes a plan, from its JSON files
            alone.
        plan_suffices: whether it needs the model only for blocks that no plan names.
        compares: whether it also shows what was measured of two models, without a plan.
        several: whether it describes any number of plans, and needs no model.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    ending: ClassVar[str] = ""
    only_counts: ClassVar[bool] = False
    uses_source: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    plan_suffices: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    several: ClassVar[bool] = False

    @abstractmethod
    def export(self, pruning: Pruning) -> str | bytes:
        """Return the text for the other tool or the reader, ending in a newline; or bytes for
        `pruning.output`.
        """
