"""What a model predicts at each position of a batch, with few logits in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sleb_cli.engine.forward.fork import fork
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import States
from sleb_cli.plan import Engine


class Predictions:
    """The logits of a batch, a slice of positions at a time.

    They are computed from what leaves the last block; with the engine `plain`, which runs whole passes, all exist at
    once.
    """

    def __init__(self, skippable: SkippableModel, ids: Tensor, removed: Sequence[int], engine: Engine) -> None:
        self._skippable, self._ids = skippable, ids
        self._hidden = next(fork(skippable, ids, removed, (), States()))[1] if engine == "fork" else None
        self._logits = None if engine == "fork" else skippable.logits(ids, removed)

    def __getitem__(self, part: slice) -> Tensor:
        """Return the logits at these positions, [batch, positions, vocabulary]."""
        if self._hidden is None:
            assert self._logits is not None
            return self._logits[:, part]
        return self._skippable.head(self._hidden[:, part], self._ids[:, part])
