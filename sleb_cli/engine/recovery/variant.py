"""A model's loss and divergence from the dense model: dense, pruned or recovered."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.logits import float32_slices, position_slices
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.stores import Store, to_cpu
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins.metrics.kl import compare_logits

POSITIONS = 256
"""How many positions' logits exist at once, over all sequences of a batch."""
BATCH_TOKENS = 1024
"""A call of this many tokens takes a CPU two thirds of the time of calls of one short sequence."""


@dataclass(frozen=True)
class Variant:
    """A model (an entered context) without some blocks, with new values of some parameters."""

    skippable: SkippableModel
    removed: Collection[int] = ()
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def final_states(self, ids: Tensor, start: tuple[int, Tensor] | None = None) -> Tensor:
        """Return the last kept block's hidden states, [batch, positions, hidden size].

        `start` is a block and the hidden states that enter it; earlier blocks are not run.
        """
        return self.entering_and_final_states(ids, 0, start)[1]

    def entering_and_final_states(
        self, ids: Tensor, block: int, start: tuple[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states that enter the kept `block`, and the final ones."""
        states: dict[str, Tensor] = {}

        def listen(index: int, entering: Tensor, leaving: Tensor) -> None:
            if index == block:
                states["entering"] = entering
            states["final"] = leaving  # the last call's stays

        with self.skippable.replaced(self.parameters):
            self.skippable.run_with_hook(ids, self.removed, listen, start)
        return states.get("entering", states["final"]), states["final"]

    def logits(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of final states, given their tokens."""
        with self.skippable.replaced(self.parameters):
            return self.skippable.head(states, ids)


def run_blocks(
    skippable: SkippableModel,
    blocks: Iterable[int],
    calls: Sequence[Sequence[Call]],
    entering: Sequence[Tensor],
    store: Store,
) -> list[Tensor]:
    """Run blocks on all batches, reading weights once; return the hidden states."""
    states = list(entering)
    order = list(blocks)
    with skippable.weights.visit(order) as visit:
        for block in order:
            visit.load(block)
            for batch, calls_of_batch in enumerate(calls):
                leaving = skippable.run_block(calls_of_batch[block], states[batch])
                states[batch] = store(leaving)
    return states


class Losses(NamedTuple):
    """Loss and divergence from the dense model, in nats."""

    loss: float
    divergence: float


class DenseComparison:
    """Compares variants of a model with the dense one on a text, which the dense one reads once."""

    def __init__(self, dense: Variant, text: Calibration) -> None:
        self.dense = dense
        device = dense.skippable.device
        counted = whole_mask(text.sequences, text.loss_mask)
        size = max(1, BATCH_TOKENS // text.sequences.shape[1])
        self.count = int(counted[:, 1:].sum())
        self.ids = torch.split(text.sequences.to(device), size)
        self.counted = torch.split(counted.to(device), size)
        self.dense_final = self._final_states(dense)

    @torch.inference_mode()
    def losses(self, variant: Variant) -> Losses:
        """Return means over the next tokens that count."""
        final = self.dense_final
        if variant is not self.dense:
            final = self._final_states(variant)
        models = (variant, self.dense)
        loss = 0.0
        divergence = 0.0
        for batch, ids in enumerate(self.ids):
            states = (final[batch], self.dense_final[batch])
            of_batch = summed_losses(models, states, ids, self.counted[batch])
            loss += of_batch.loss
            divergence += of_batch.divergence
        return Losses(loss / self.count, divergence / self.count)

    @torch.inference_mode()
    def _final_states(self, variant: Variant) -> list[Tensor]:
        skippable = variant.skippable
        if skippable.weights.resident:
            return [to_cpu(variant.final_states(ids)) for ids in self.ids]
        # Streamed weights are read once for all batches.
        calls = [skippable.calls(ids) for ids in self.ids]
        entering = [calls_of_batch[0].entering for calls_of_batch in calls]
        kept_blocks = [
            block for block in range(len(skippable.switches)) if block not in variant.removed
        ]
        with skippable.replaced(variant.parameters):
            return run_blocks(skippable, kept_blocks, calls, entering, to_cpu)


def summed_losses(
    models: tuple[Variant, Variant],
    states: tuple[Tensor, Tensor],
    ids: Tensor,
    counted: Tensor,
) -> Losses:
    """Compare a model with the dense one on a batch, summed in float64.

    `models` are the model and the dense one, and `states` their final states, [batch, positions,
    hidden size], on any device. `counted` marks which of the `ids` count as next tokens; both are
    [batch, positions].
    """
    model, dense = models
    model_states = states[0].to(ids.device)
    dense_states = states[1].to(ids.device)
    loss = 0.0
    divergence = 0.0
    for positions in position_slices(ids, POSITIONS):
        tokens = ids[:, positions]
        chosen = counted[:, 1:][:, positions].flatten()
        targets = ids[:, 1:][:, positions].flatten()[chosen]
        ours = model.logits(model_states[:, positions], tokens).flatten(0, 1)[chosen]
        theirs = dense.logits(dense_states[:, positions], tokens).flatten(0, 1)[chosen]
        for rows in float32_slices(ours):
            logits = ours[rows].float()
            comparison = compare_logits(theirs[rows].float(), logits)
            target_logits = logits.gather(-1, targets[rows, None])[:, 0]
            losses = comparison.log_sum_q - target_logits
            loss += float(as_float64(losses).sum())
            divergence += float(as_float64(comparison.divergence).sum())
    return Losses(loss, divergence)
