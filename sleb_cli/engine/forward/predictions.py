"""What a model predicts at each position of a batch, with few logits in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sleb_cli.engine.forward.fork import Walk, fork, walk_together
from sleb_cli.engine.forward.holding import SharedInputs, on_host
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States


class Predictions:
    """The logits of a batch, a slice of positions at a time.

    They are computed from what leaves the last block; of a model that only runs whole, all exist at once.
    """

    def __init__(
        self, skippable: SkippableModel, ids: Tensor, *, hidden: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        self._skippable, self._ids, self._hidden, self._logits = skippable, ids, hidden, logits

    def __getitem__(self, part: slice) -> Tensor:
        """Return the logits at these positions, [batch, positions, vocabulary]."""
        if self._hidden is None:
            assert self._logits is not None
            return self._logits[:, part]
        return self._skippable.head(self._hidden[:, part].to(self._skippable.device), self._ids[:, part])


def predict(skippable: SkippableModel, ids: Tensor, removed: Sequence[int], *, forks: bool) -> Predictions:
    """Return what the model predicts without these blocks; `forks` tells whether blocks can run on their own."""
    if forks:
        return Predictions(skippable, ids, hidden=fork(skippable, ids, removed, ())[BASE])
    return Predictions(skippable, ids, logits=skippable.logits(ids, removed))


def predict_together(
    skippable: SkippableModel, batches: Sequence[Tensor], sizes: Sequence[Sequence[int]]
) -> Iterator[list[Predictions]]:
    """Yield, for each batch, what the model predicts without each of these sets of blocks.

    Its weights are read once for all of them, and the hidden states of all are in host memory meanwhile.
    """
    shared, walks = SharedInputs(), []
    for ids in batches:
        calls = skippable.calls(ids)
        calls = shared.of(calls, on_host(calls[0].entering))
        walks.append([Walk(skippable, calls, States(), removed, (), hold=on_host) for removed in sizes])
    for _ in walk_together(skippable, [walk for of_batch in walks for walk in of_batch]):
        pass
    for ids, of_batch in zip(batches, walks, strict=True):
        yield [Predictions(skippable, ids, hidden=walk.branches.pop(BASE)) for walk in of_batch]
