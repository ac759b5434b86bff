"""A model in one of its forms (dense, pruned, recovered), and its loss and its divergence from the dense model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.logits import float32_slices
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_plugins.metrics.kl import divergence_terms

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

        with parameters_replaced(self.skippable.model, self.parameters):
            self.skippable.watch(ids, self.removed, listen, start)
        return found.get("entering", found["final"]), found["final"]

    def logits(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of a slice of final states, given its tokens."""
        with parameters_replaced(self.skippable.model, self.parameters):
            return self.skippable.head(states, ids)


@contextmanager
def parameters_replaced(model: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Set parameters to new values by name, and restore their own on exit."""
    own = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


@torch.inference_mode()
def losses(variant: Variant, dense: Variant, sequences: Tensor) -> tuple[float, float]:
    """Return a variant's loss and its divergence from the dense model on these sequences, [sequences, length].

    Both are means over the predicted tokens, in nats.
    """
    count, total = len(sequences) * (sequences.shape[1] - 1), (0.0, 0.0)
    for sequence in sequences.to(dense.skippable.model.device):
        ids = sequence[None]
        everywhere = torch.arange(ids.shape[1] - 1, device=ids.device)
        found = summed_losses(variant, dense, variant.final_states(ids), dense.final_states(ids), ids, everywhere)
        total = (total[0] + found[0], total[1] + found[1])
    return total[0] / count, total[1] / count


def summed_losses(
    variant: Variant, dense: Variant, states: Tensor, dense_states: Tensor, ids: Tensor, positions: Tensor
) -> tuple[float, float]:
    """Return the loss and the divergence of some positions of a batch, summed in float64, in nats.

    Args:
        variant: the model.
        dense: the dense model.
        states: the model's final states, [batch, positions, hidden size].
        dense_states: as `states`, the dense model's.
        ids: the tokens, [batch, positions].
        positions: which positions count, each with a next token.
    """
    loss = divergence = 0.0
    for part in torch.split(positions, max(1, POSITIONS // len(ids))):
        here, targets = ids[:, part], ids[:, part + 1].flatten()
        ours, theirs = (
            model.logits(of_model[:, part], here).flatten(0, 1)
            for model, of_model in ((variant, states), (dense, dense_states))
        )
        for rows in float32_slices(ours):
            log_q, log_p = (logits[rows].float().log_softmax(-1) for logits in (ours, theirs))
            loss -= float(as_float64(log_q.gather(-1, targets[rows, None])).sum())
            divergence += float(as_float64(divergence_terms(log_p.exp(), log_p, log_q).sum(-1)).sum())
    return loss, divergence
