"""A model in one of its forms (dense, pruned, recovered), and its loss and its divergence from the dense model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.logits import float32_slices
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.text.calibration import Calibration
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
        found: dict[str, Tensor] = {}

        def listen(index: int, entering: Tensor, leaving: Tensor) -> None:
            if index == block:
                found["entering"] = entering
            found["final"] = leaving  # the last call's stays

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
def losses(variant: Variant, dense: Variant, text: Calibration, group: ProcessGroup) -> Losses:
    """Compare a variant with the dense model on a text, whose sequences the processes of a group share out.

    All figures are means over the predicted tokens that count.
    """
    mine, device = range(group.rank, len(text.sequences), group.size), dense.skippable.device
    counted = whole_mask(text.sequences, text.loss_mask)
    final = _final_states(variant, dense, text.sequences[list(mine)].to(device))
    own = [
        (number, summed_losses((variant, dense), states, ids, counted[[number]].to(device)))
        for number, (ids, states) in zip(mine, final, strict=True)
    ]
    found = sorted(item for of_process in group.gather(own) for item in of_process)
    count = int(counted[:, 1:].sum())
    return Losses(*(sum(values) / count for values in zip(*(of_sequence for _, of_sequence in found), strict=True)))


def _final_states(variant: Variant, dense: Variant, sequences: Tensor) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Yield each sequence and the final states of both models, one by one; streamed weights are read once for all."""
    skippable, batches = dense.skippable, [sequence[None] for sequence in sequences]
    models = [variant] if variant is dense else [variant, dense]
    if skippable.weights.resident:
        for ids in batches:
            final = [model.final_states(ids) for model in models]
            yield ids, [final[0], final[-1]]
        return
    calls = [skippable.calls(ids) for ids in batches]
    states = [[of_batch[0].entering for of_batch in calls] for _ in models]
    for block in skippable.weights.visit(range(len(skippable.switches))):
        for number, model in enumerate(models):
            if block not in model.removed:
                with skippable.replaced(model.parameters):
                    states[number] = [
                        skippable.run_block(of_batch[block], entering)
                        for of_batch, entering in zip(calls, states[number], strict=True)
                    ]
    yield from zip(batches, zip(states[0], states[-1], strict=True), strict=True)


def summed_losses(
    models: Sequence[Variant], states: Sequence[Tensor], ids: Tensor, counted: Tensor, every: int = 1
) -> Losses:
    """Compare a model with the dense one at every n-th position of a batch, summed in float64.

    Args:
        models: the model, and the dense model.
        states: the final states of each, [batch, positions, hidden size], on any device.
        ids: the tokens, [batch, positions].
        counted: which of them count as next tokens, bool [batch, positions].
        every: how far apart the positions are.
    """
    loss = divergence = 0.0
    states = [of_model.to(ids.device) for of_model in states]
    positions = torch.arange(0, ids.shape[1] - 1, every, device=ids.device)
    for part in torch.split(positions, max(1, POSITIONS // len(ids))):
        targets, chosen = ids[:, part + 1].flatten(), counted[:, part + 1].flatten()
        ours, theirs = (
            model.logits(of_model[:, part], ids[:, part]).flatten(0, 1)
            for model, of_model in zip(models, states, strict=True)
        )
        if not chosen.all():  # those that count are copied, which all need not be
            ours, theirs, targets = ours[chosen], theirs[chosen], targets[chosen]
        for rows in float32_slices(ours):
            logits = ours[rows].float()
            found = compare_logits(theirs[rows].float(), logits)
            loss += float(as_float64(found.log_sum_q - logits.gather(-1, targets[rows, None])[:, 0]).sum())
            divergence += float(as_float64(found.divergence).sum())
    return Losses(loss, divergence)
