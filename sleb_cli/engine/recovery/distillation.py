"""The gradient of the divergence from the dense model, with few logits in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import float32_slices, position_slices
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_plugins.metrics.kl import compare_logits

WARMUP_STEPS = 6


@torch.no_grad()
def divergence_and_gradient(
    student: Tensor, teacher: Tensor, scale: float, counted: Tensor
) -> tuple[float, Tensor]:
    """Return KL(teacher || student) in nats, summed over the `counted` positions, and `scale` times
    its gradient.

    The logits are [..., vocabulary]. The gradient with respect to the student's, softmax(student) -
    softmax(teacher), has their data type; only slices of it are ever float32.
    """
    ours = student.flatten(0, -2)
    theirs = teacher.flatten(0, -2)
    gradient = torch.empty_like(ours)
    total = torch.zeros((), device=ours.device)
    for rows in float32_slices(ours):
        comparison = compare_logits(theirs[rows].float(), ours[rows].float())
        chosen = counted.flatten()[rows]
        total += comparison.divergence.mul_(chosen).sum()
        difference = comparison.q.sub_(comparison.p)
        gradient[rows] = difference.mul_(scale).mul_(chosen[:, None])
    return float(total), gradient.view_as(student)


class Batch(NamedTuple):
    """Sequences to train on, and the teacher's states before the first trained block, and final.

    `ids` are [batch, positions]; `counted` marks those that count as next tokens, bool of the same
    shape.
    """

    ids: Tensor
    counted: Tensor
    entering: Tensor
    teacher_final: Tensor

    @property
    def targets(self) -> int:
        """How many next tokens count."""
        return int(self.counted[:, 1:].sum())

    @property
    def tokens(self) -> int:
        """How many tokens the sequences have."""
        return self.ids.numel()

    def split(self, size: int) -> list[Batch]:
        """Cut into batches of `size` sequences."""
        pieces = zip(*(torch.split(tensor, size) for tensor in self), strict=True)
        return [Batch(*tensors) for tensors in pieces]


@dataclass(frozen=True)
class Distillation:
    """A student that learns a teacher's predictions; both share the blocks before `first`."""

    teacher: Variant
    student: Variant
    first: int

    @torch.no_grad()
    def batch(self, ids: Tensor, counted: Tensor) -> Batch:
        """Run the teacher on sequences; both tensors may be on any device."""
        device = self.teacher.skippable.device
        ids = ids.to(device)
        entering, final = self.teacher.entering_and_final_states(ids, self.first)
        return Batch(ids, counted.to(device), entering, final)

    def divergence(self, batch: Batch) -> float:
        """Sum the student's divergence over the next tokens that count."""
        final = self.student.final_states(batch.ids, (self.first, batch.entering))
        models = (self.student, self.teacher)
        states = (final, batch.teacher_final)
        return summed_losses(models, states, batch.ids, batch.counted).divergence

    def add_gradient(self, batch: Batch, scale: float = 1.0) -> float:
        """Add `scale` times the gradient of the mean divergence, and return that divergence."""
        ids = batch.ids
        counted = batch.counted[:, 1:]
        states = self.student.final_states(ids, (self.first, batch.entering))
        leaf = states.detach().requires_grad_()
        total = 0.0
        # Logits are large, so the gradient of the final states is summed over slices of them. One
        # pass follows.
        for positions in position_slices(ids, variant.POSITIONS):
            with torch.no_grad():
                theirs = self.teacher.logits(batch.teacher_final[:, positions], ids[:, positions])
            ours = self.student.logits(leaf[:, positions], ids[:, positions])
            divergence, gradient = divergence_and_gradient(
                ours, theirs, scale / batch.targets, counted[:, positions]
            )
            torch.autograd.backward(ours, gradient)
            total += divergence
        assert leaf.grad is not None
        self.student.skippable.backward(states, leaf.grad, ids.shape)
        return total / batch.targets


def learning_rate(peak: float, share: float, steps: int) -> float:
    """Return the learning rate after `steps`: a linear warmup, then a cosine to 0.

    `share` of the budget is used.
    """
    # Adam's moments are unreliable in the first steps.
    warmup = (steps + 1) / WARMUP_STEPS
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return peak * min(warmup, cosine)
