"""The gradient of the divergence from the dense model, with few logits in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import float32_slices, position_slices
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.portions import Portion
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins.metrics.kl import compare_logits

WARMUP_STEPS = 6


@torch.no_grad()
def divergence_and_gradient(
    student: Tensor, teacher: Tensor, scale: float, counted: Tensor
) -> tuple[float, Tensor]:
    """Return KL(teacher || student) in nats, summed over the `counted` positions, and `scale` times its gradient.

    The logits are [..., vocabulary]. The gradient with respect to the student's, softmax(student) -
    softmax(teacher), has their data type; only slices of it are ever float32.
    """
    ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
    gradient, total = torch.empty_like(ours), torch.zeros((), device=ours.device)
    for rows in float32_slices(ours):
        comparison = compare_logits(theirs[rows].float(), ours[rows].float())
        chosen = counted.flatten()[rows]
        total += comparison.divergence.mul_(chosen).sum()
        gradient[rows] = comparison.q.sub_(comparison.p).mul_(scale).mul_(chosen[:, None])
    return float(total), gradient.view_as(student)


class Batch(NamedTuple):
    """Sequences to train on, and the teacher's hidden states: before the first trained block, and
    final.

    `ids` are [batch, positions]; `counted` marks those that count as next tokens, bool of the same
    shape.
    """

    ids: Tensor
    counted: Tensor
    entering: Tensor
    teacher_final: Tensor


@dataclass(frozen=True)
class Distillation:
    """A student that learns a teacher's predictions from block `first` on; both share the blocks
    before it.
    """

    teacher: Variant
    student: Variant
    first: int

    def divergence(self, batch: Batch) -> float:
        """Sum the student's divergence over the next tokens that count."""
        states = (
            self.student.final_states(batch.ids, (self.first, batch.entering)),
            batch.teacher_final,
        )
        return summed_losses(
            (self.student, self.teacher), states, batch.ids, batch.counted
        ).divergence

    def add_gradient(self, batch: Batch, scale: float = 1.0) -> float:
        """Add `scale` times the mean divergence's gradient to the student's parameters; return that
        divergence.
        """
        ids, states = batch.ids, self.student.final_states(batch.ids, (self.first, batch.entering))
        leaf, count = states.detach().requires_grad_(), int(batch.counted[:, 1:].sum())
        counted, total = batch.counted[:, 1:], 0.0
        # Logits are large, so the gradient of the final states is summed over slices of them. One
        # pass follows.
        for positions in position_slices(ids, variant.POSITIONS):
            with torch.no_grad():
                theirs = self.teacher.logits(batch.teacher_final[:, positions], ids[:, positions])
            ours = self.student.logits(leaf[:, positions], ids[:, positions])
            divergence, gradient = divergence_and_gradient(
                ours, theirs, scale / count, counted[:, positions]
            )
            torch.autograd.backward(ours, gradient)
            total += divergence
        assert leaf.grad is not None
        self.student.skippable.backward(states, leaf.grad)
        return total / count


class TeacherStates:
    """The teacher's hidden states on sequences, computed once for all uses.

    A row is read in the batch of its first use, whenever that is, so a healing that was resumed
    finds the same bits.
    """

    def __init__(self, distillation: Distillation, text: Portion, size: int) -> None:
        self._distillation, device = distillation, distillation.teacher.skippable.device
        self.rows, self.counted = (
            text.sequences.to(device),
            whole_mask(text.sequences, text.loss_mask).to(device),
        )
        first_uses = list(dict.fromkeys(text.order))
        self.batches = [first_uses[at : at + size] for at in range(0, len(first_uses), size)]
        self._batch_of = {row: batch for batch in self.batches for row in batch}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def batch(self, rows: list[int]) -> Batch:
        """Return these rows with the teacher's states."""
        teacher, first = self._distillation.teacher, self._distillation.first
        for row in rows:
            if row not in self._known:
                batch = self._batch_of[row]
                entering, final = teacher.entering_and_final_states(self.rows[batch], first)
                # Copies, so that a row that is still needed does not hold the others of its batch.
                self._known |= {
                    row: (entering[at].clone(), final[at].clone()) for at, row in enumerate(batch)
                }
        states = (
            torch.stack(of_rows)
            for of_rows in zip(*(self._known[row] for row in rows), strict=True)
        )
        return Batch(self.rows[rows], self.counted[rows], *states)

    def keep(self, rows: Collection[int]) -> None:
        """Forget the states of all other rows."""
        self._known = {row: self._known[row] for row in set(rows) & self._known.keys()}


def learning_rate(peak: float, share: float, steps: int) -> float:
    """Return the learning rate after `steps`, with `share` of the budget used: a linear warmup,
    then a cosine to 0.
    """
    # Adam's moments are unreliable in the first steps.
    return peak * min((steps + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
