"""A model in one of its forms (dense, pruned, recovered), and its loss and its divergence from the dense model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.logits import float32_slices
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins.metrics.kl import compare_logits

# How many positions' logits exist at once, over all sequences of a batch.
POSITIONS = 256


@dataclass(frozen=True)
class Variant:
    """A model without some of its blocks and with new values for some of its parameters.

    Attributes:
        skippable: the model, as an entered context.
        removed: the skipped blocks.
        parameters: new values by the model's own parameter names.
    """

    skippable: SkippableModel
    removed: Collection[int] = ()
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def final_states(self, ids: Tensor, start: tuple[int, Tensor] | None = None) -> Tensor:
        """Return the hidden states that leave the last kept block, [batch, positions, hidden size].

        `start` is a block and the hidden states that enter it: the blocks before it are not run.
        """
        return self.entering_and_final_states(ids, 0, start)[1]

    def entering_and_final_states(
        self, ids: Tensor, block: int, start: tuple[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states that enter `block`, which must be kept, and those that leave the last kept block."""
        last = max(index for index in range(len(self.skippable.switches)) if index not in self.removed)
        found: dict[str, Tensor] = {}

        def listen(index: int, entering: Tensor, leaving: Tensor) -> None:
            if index == block:
                found["entering"] = entering
            if index == last:
                found["final"] = leaving

        with self.skippable.replaced(self.parameters):
            self.skippable.run_with_hook(ids, self.removed, listen, start)
        return found.get("entering", found["final"]), found["final"]

    def logits(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of a slice of final states, given its tokens."""
        with self.skippable.replaced(self.parameters):
            return self.skippable.head(states, ids)


class Losses(NamedTuple):
    """The loss and the divergence from the dense model, in nats."""

    loss: float
    divergence: float


@torch.inference_mode()
def losses(
    variant: Variant,
    dense: Variant,
    sequences: Tensor,
    group: ProcessGroup | None = None,
    loss_mask: Tensor | None = None,
) -> Losses:
    """Compare a variant with the dense model on these sequences, [sequences, length].

    All figures are means over the predicted tokens that count (`loss_mask`, [sequences, length]; None for all). The
    processes of a group share out the sequences.
    """
    group, device = group or ProcessGroup(), dense.skippable.device
    mine = range(group.rank, len(sequences), group.size)
    everywhere = torch.arange(sequences.shape[1] - 1, device=device)
    counted = whole_mask(sequences, loss_mask)
    own = [
        (number, summed_losses(variant, dense, states, dense_states, ids, everywhere, counted[[number]].to(device)))
        for number, (ids, states, dense_states) in zip(
            mine, _final_states(variant, dense, sequences[list(mine)].to(device)), strict=True
        )
    ]
    found = sorted(item for of_process in group.gather(own) for item in of_process)
    count = int(counted[:, 1:].sum())
    return Losses(*(sum(values) / count for values in zip(*(of_sequence for _, of_sequence in found), strict=True)))


def _final_states(variant: Variant, dense: Variant, sequences: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each sequence and the final states of both models, one by one; streamed weights are read once for all."""
    batches = [sequence[None] for sequence in sequences]
    if dense.skippable.weights.resident:
        for ids in batches:
            final = variant.final_states(ids)
            yield ids, final, final if variant is dense else dense.final_states(ids)
        return
    skippable = dense.skippable
    calls = [skippable.calls(ids) for ids in batches]
    states = {id(model): [of_batch[0].entering for of_batch in calls] for model in (variant, dense)}
    for block in skippable.weights.visit(range(len(skippable.switches))):
        for model in {id(model): model for model in (variant, dense) if block not in model.removed}.values():
            with skippable.replaced(model.parameters):
                states[id(model)] = [
                    skippable.run_block(of_batch[block], entering)
                    for of_batch, entering in zip(calls, states[id(model)], strict=True)
                ]
    yield from zip(batches, states[id(variant)], states[id(dense)], strict=True)


def summed_losses(
    variant: Variant,
    dense: Variant,
    states: Tensor,
    dense_states: Tensor,
    ids: Tensor,
    positions: Tensor,
    loss_mask: Tensor | None = None,
) -> Losses:
    """Compare some positions of a batch, summed in float64.

    Args:
        variant: the model.
        dense: the dense model.
        states: the model's final states, [batch, positions, hidden size], on any device.
        dense_states: as `states`, the dense model's.
        ids: the tokens, [batch, positions].
        positions: which positions count, each with a next token.
        loss_mask: which of the next tokens count, bool [batch, positions]; None for all.
    """
    loss = divergence = 0.0
    if loss_mask is not None and bool(loss_mask[:, 1:].all()):
        loss_mask = None
    states, dense_states = states.to(ids.device), dense_states.to(ids.device)
    for part in torch.split(positions, max(1, POSITIONS // len(ids))):
        here, targets = ids[:, part], ids[:, part + 1].flatten()
        ours, theirs = (
            model.logits(of_model[:, part], here).flatten(0, 1)
            for model, of_model in ((variant, states), (dense, dense_states))
        )
        if loss_mask is not None:  # those that count are copied, which all need not be
            counted = loss_mask[:, part + 1].flatten()
            ours, theirs, targets = ours[counted], theirs[counted], targets[counted]
        for rows in float32_slices(ours):
            logits = ours[rows].float()
            found = compare_logits(theirs[rows].float(), logits)
            loss += float(as_float64(found.log_sum_q - logits.gather(-1, targets[rows, None])[:, 0]).sum())
            divergence += float(as_float64(found.divergence).sum())
    return Losses(loss, divergence)
