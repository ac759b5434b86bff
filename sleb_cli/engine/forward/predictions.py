"""What a model predicts at each position of a batch, with few logits in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sleb_cli.engine.forward.fork import Walk, fork, walk_together
from sleb_cli.engine.forward.holding import SharedInputs, to_cpu
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States


class Predictions:
    """The logits of a batch, computed a slice of positions at a time from what leaves the last block."""

    def __init__(self, skippable: SkippableModel, ids: Tensor, hidden: Tensor) -> None:
        self._skippable, self._ids, self._hidden = skippable, ids, hidden

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """Return logits by sequences and positions, as a tensor of all logits does."""
        return self._skippable.head(self._hidden[where].to(self._skippable.places[-1]), self._ids[where])


Logits = Tensor | Predictions
"""The logits of a batch; a model that only runs whole has them all at once."""


def predict(skippable: SkippableModel, ids: Tensor, removed: Sequence[int], *, forks: bool) -> Logits:
    """Return what the model predicts without these blocks; `forks` tells whether blocks can run on their own."""
    if forks:
        return Predictions(skippable, ids, fork(skippable, ids, removed, ())[BASE])
    return skippable.logits(ids, removed)


def predict_together(
    skippable: SkippableModel, batches: Sequence[Tensor], sizes: Sequence[Sequence[int]]
) -> Iterator[list[Logits]]:
    """Yield, for each batch, what the model predicts without each of these sets of blocks.

    Its weights are read once for all of them, and the hidden states of all are in host memory meanwhile.
    """
    shared, walks = SharedInputs(skippable, to_cpu), []
    for ids in batches:
        calls = shared.calls(ids)
        walks.append([Walk(skippable, calls, States(), removed, (), store=to_cpu) for removed in sizes])
    for _ in walk_together(skippable, [walk for of_batch in walks for walk in of_batch]):
        pass
    for ids, of_batch in zip(batches, walks, strict=True):
        yield [Predictions(skippable, ids, walk.branches.pop(BASE)) for walk in of_batch]
