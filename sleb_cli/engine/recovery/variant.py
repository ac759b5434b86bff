"""A model in one of its forms: dense, pruned, recovered; and what it loses on a text, compared with the dense one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import WIDENED_BYTES
from sleb_cli.engine.forward.skipping import SkippableModel

# Positions whose logits exist at once, over all sequences of a batch.
POSITIONS = 256


@dataclass(frozen=True)
class Variant:
    """A gated model without some of its blocks and with other values for some of its parameters.

    Attributes:
        skippable: the model, as an entered context.
        removed: the blocks that are off.
        parameters: new values by the model's own parameter names.
    """

    skippable: SkippableModel
    removed: Collection[int] = ()
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def final_states(self, ids: Tensor, start: tuple[int, Tensor] | None = None) -> Tensor:
        """Give the hidden states that leave the last block that is on, [batch, positions, hidden size].

        With `start`, a block and the states that enter it, the walk begins there.
        """
        return self.two_depths(ids, 0, start)[1]

    def two_depths(self, ids: Tensor, block: int, start: tuple[int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Give the hidden states that enter `block`, which must be on, and those that leave the last one."""
        last = max(index for index in range(len(self.skippable.switches)) if index not in self.removed)
        found: dict[str, Tensor] = {}

        def listen(index: int, entering: Tensor, leaving: Tensor) -> None:
            if index == block:
                found["entering"] = entering
            if index == last:
                found["final"] = leaving

        with placed(self.skippable.model, self.parameters):
            self.skippable.watch(ids, self.removed, listen, start)
        return found.get("entering", found["final"]), found["final"]

    def logits(self, states: Tensor, ids: Tensor) -> Tensor:
        """Give the logits of a stretch of final states, and of their tokens."""
        with placed(self.skippable.model, self.parameters):
            return self.skippable.head(states, ids)


@contextmanager
def placed(model: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values in the place of parameters, and the parameters' own back."""
    own = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


def stretches(ids: Tensor) -> Iterator[slice]:
    """Divide the predicting positions of a batch into stretches whose logits may exist at once."""
    step = max(1, POSITIONS // len(ids))
    for start in range(0, ids.shape[1] - 1, step):
        yield slice(start, min(start + step, ids.shape[1] - 1))


def pieces(logits: Tensor) -> int:
    """Say how many positions' logits are widened to float32 at once."""
    return max(1, WIDENED_BYTES.get(logits.device.type, 256 << 20) // (4 * logits.shape[-1]))


@torch.inference_mode()
def losses(variant: Variant, dense: Variant, sequences: Tensor) -> tuple[float, float]:
    """Measure a variant on these sequences, [sequences, length]: its loss and its divergence from the dense model.

    Both are means over the predicted tokens, in nats.
    """
    loss = divergence = 0.0
    for sequence in sequences.to(dense.skippable.model.device):
        ids = sequence[None]
        states, dense_states = variant.final_states(ids), dense.final_states(ids)
        for part in stretches(ids):
            here, targets = ids[:, part], ids[0, part.start + 1 : part.stop + 1]
            ours, theirs = variant.logits(states[:, part], here)[0], dense.logits(dense_states[:, part], here)[0]
            step = pieces(ours)
            for start in range(0, len(targets), step):
                log_q = ours[start : start + step].float().log_softmax(-1)
                log_p = theirs[start : start + step].float().log_softmax(-1)
                loss -= float(log_q.gather(-1, targets[start : start + step, None]).double().sum())
                divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    count = len(sequences) * (sequences.shape[1] - 1)
    return loss / count, divergence / count
