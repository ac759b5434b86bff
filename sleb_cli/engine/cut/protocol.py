"""The protocol of a cut: what writing, proving and describing a result must know of it.

A cut removes parts of one kind, and names them as in the model that the cuts before it left: blocks
go first. By default, a method changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from sleb_cli.engine.files.headers import StoredTensor
from sleb_cli.engine.files.shards import NewTensor
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.events import Notify
from sleb_cli.order import SizeKey
from sleb_cli.records import Check, Reference
from sleb_cli.results import CutRecord


class Removal:
    """What cuts of checkpoints and of GGUF files share.

    Attributes:
        removals: the blocks that no longer run, in the order of their removal, which the dense
            model skips.
    """

    removals: tuple[int, ...] = ()

    @property
    def size_key(self) -> SizeKey:
        """The key of this size in results: the blocks, or for n other parts (0, ..., n-1)."""
        return self.removals

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens that stay, ascending, by their old numbers; None if all do."""
        return None

    @property
    def note(self) -> str | None:
        """A sentence for whoever has the result written."""
        return None

    @property
    def name_parts(self) -> tuple[str, ...]:
        """The words that it adds to the name of a checkpoint."""
        return ()

    def record(self, sizes: Mapping[str, tuple[int, int]]) -> Mapping[str, CutRecord]:
        """Return its entry in results, under its key; `sizes` has the sizes before and after."""
        return {}


class Cut(Removal, ABC):
    """The removal of parts of one kind from a checkpoint.

    Attributes:
        tolerance: relative difference of logits from the dense model's, if only rounding differs.
        reference: what proofs call the dense model that simulates the removal.
        extra_check: what proofs call the comparison of the `extra_outputs`, if there are any.
    """

    tolerance: ClassVar[float] = 0.0
    reference: ClassVar[Reference] = "whole"
    extra_check: ClassVar[Check | None] = None

    @property
    @abstractmethod
    def description(self) -> str:
        """The parts that go, to be read after "without"."""

    @property
    def files(self) -> Mapping[str, Any]:
        """The contents of the checkpoint's JSON files by name; None for files that it loses."""
        return {}

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the new contents of `config.json`, or of another file of settings."""
        return values

    def tensor(self, name: str) -> tuple[str, Slices | None] | None:
        """Return the new name of a tensor, and the slices that stay (None: all); None if it goes.

        `name` may be its name in the files or in the model.
        """
        return name, None

    def simulate(self, dense: nn.Module) -> AbstractContextManager[object]:
        """Have the dense model, whose `removals` are skipped, compute without these parts."""
        return nullcontext()

    def break_ties(self) -> AbstractContextManager[object]:
        """Break ties alike in both models, where rounding would choose."""
        return nullcontext()

    def extra_outputs(
        self, model: nn.Module, *, pruned: bool
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Name tensors that must also agree, once the model has run: logits may not show them."""
        return nullcontext({})

    def texts(self, tokenizer: Any) -> list[str]:
        """Return texts that both tokenizers must split alike; `tokenizer` is the dense model's."""
        return []

    def tokenizer_checks(self, pruned: Any, dense: Any, notify: Notify) -> list[Check]:
        """Compare the tokenizers of the pruned and the dense model, and return what passed."""
        return []


class GgufCut(Removal, ABC):
    """The removal of parts of one kind from a GGUF file."""

    @abstractmethod
    def header(self, file: GgufFile) -> GgufFile:
        """Return the header of the new file; its tensors have their offsets in the source."""

    @abstractmethod
    def for_model(self, architecture: Architecture) -> Cut:
        """Return this cut of the model that transformers reads in the file.

        Raises:
            UsageError: the model has no such parts.
            UnsupportedModelError: the model cannot be cut there.
        """


Tensors = Iterable[StoredTensor | NewTensor | GgufTensor]


def cut_records(cuts: Iterable[Removal], before: Tensors, after: Tensors) -> dict[str, Any]:
    """Return the entries of these cuts in results, by key.

    `before` and `after` are the model's tensors before and after all cuts.
    """

    parameters, weights_bytes = _size(before)
    parameters_left, weights_bytes_left = _size(after)
    sizes = {
        "parameters": (parameters, parameters_left),
        "weights_bytes": (weights_bytes, weights_bytes_left),
    }
    records: dict[str, Any] = {}
    for cut in cuts:
        records.update(cut.record(sizes))
    return records


def _size(tensors: Tensors) -> tuple[int, int]:
    """Return the number of parameters, and the bytes."""
    parameters = 0
    weights_bytes = 0
    for tensor in tensors:
        parameters += math.prod(tensor.shape)
        weights_bytes += tensor.size
    return parameters, weights_bytes
