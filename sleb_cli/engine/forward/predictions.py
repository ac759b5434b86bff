"""The predictions of models without several sets of blocks, which share their walks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.forward.fork import SizesWalk, walk_together
from sleb_cli.engine.forward.logits import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.stores import SharedInputs, keep_on_device, to_cpu
from sleb_cli.events import Advance, no_progress


def predict_together(
    skippable: SkippableModel,
    batches: Sequence[Any],
    sizes: Sequence[Collection[int]],
    progress: Advance = no_progress,
) -> list[list[Any]]:
    """Return, for each batch, the model's result without each of these sets of blocks.

    Blocks that these models share are computed once and, if they are streamed, read once. Each
    sequence is one unit of `progress`.
    """
    store = keep_on_device if skippable.weights.resident else to_cpu
    shared = SharedInputs(skippable, store)
    walks = [SizesWalk(skippable, shared.calls(ids), sizes, store, progress) for ids in batches]
    walk_together(skippable, walks)
    predictions = []
    for ids, walk in zip(batches, walks, strict=True):
        of_batch = []
        for removed in walk.sizes:
            of_batch.append(skippable.ending.of_states(skippable, ids, walk.branches[removed]))
        predictions.append(of_batch)
    return predictions


@dataclass(eq=False)
class SharedPredictions:
    """Predictions without each of some sets of blocks, asked for in turn on the same batches.

    The first set computes all, so that blocks that they share run once. The others wait, as hidden
    states in up to `memory` bytes of the host; a set for which there is no room is computed when it
    is asked for.
    """

    skippable: SkippableModel
    sizes: Sequence[Collection[int]]
    memory: int
    _waiting: dict[tuple[frozenset[int], torch.Size, bytes], Predictions] = field(
        default_factory=dict, init=False
    )

    @torch.inference_mode()
    def logits(self, ids: Tensor, removed: Collection[int]) -> Tensor:
        """Return all logits of a batch without the `removed` blocks, one of the sets."""
        size = frozenset(removed)
        batch = (ids.shape, ids.cpu().numpy().tobytes())
        waiting = self._waiting.pop((size, *batch), None)
        if waiting is not None:
            return waiting[:, :]
        sizes = [size]
        if size == frozenset(self.sizes[0]) and self.memory > 0:
            sizes = [frozenset(removals) for removals in self.sizes]
        (predictions,) = predict_together(self.skippable, [ids], sizes)
        for other, later in zip(sizes[1:], predictions[1:], strict=True):
            later.hidden = to_cpu(later.hidden)
            self.memory -= later.hidden.nbytes
            self._waiting[other, *batch] = later
        logits: Tensor = predictions[0][:, :]
        return logits
