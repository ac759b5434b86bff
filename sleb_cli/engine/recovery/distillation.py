"""The gradient of the divergence from the dense model, with few logits in memory at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import float32_slices, position_slices
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.variant import Variant
from sleb_plugins.metrics.kl import compare_logits

WARMUP_STEPS = 6


@torch.no_grad()
def divergence_and_gradient(
    student: Tensor, teacher: Tensor, scale: float, counted: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return KL(teacher || student) in nats, summed over the `counted` positions, and `scale` times its gradient.

    Both logits are [..., vocabulary]. The gradient at the student's, softmax(student) - softmax(teacher), is in their
    data type; at most one slice of it exists in float32.
    """
    ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
    gradient, total = torch.empty_like(ours), torch.zeros((), device=ours.device)
    for rows in float32_slices(ours):
        found = compare_logits(theirs[rows].float(), ours[rows].float())
        slope = found.q.sub_(found.p).mul_(scale)
        if counted is not None:
            found.divergence.mul_(counted.flatten()[rows])
            slope.mul_(counted.flatten()[rows, None])
        total += found.divergence.sum()
        gradient[rows] = slope
    return float(total), gradient.view_as(student)


def distill(
    teacher: Variant,
    student: Variant,
    ids: Tensor,
    wanted: Tensor,
    start: tuple[int, Tensor] | None = None,
    scale: float = 1.0,
    loss_mask: Tensor | None = None,
) -> float:
    """Add the gradient of the mean divergence, times `scale`, to the student's parameters, and return the divergence.

    The gradient of the student's final states is summed slice by slice of logits, then backpropagated in one pass.

    Args:
        teacher: the dense model.
        student: the model to train.
        ids: the tokens, [batch, positions].
        wanted: the teacher's final states there.
        start: a block and the hidden states that enter it, if the blocks before it are not to run.
        scale: keeps gradients in the range of their data type; a power of two.
        loss_mask: which tokens count as next tokens, bool [batch, positions]; None for all.

    Returns:
        The mean over the next tokens that count, in nats.
    """
    states = student.final_states(ids, start)
    leaf = states.detach().requires_grad_()
    counted = None if loss_mask is None or bool(loss_mask[:, 1:].all()) else loss_mask[:, 1:]
    count, total = ids[:, 1:].numel() if counted is None else int(counted.sum()), 0.0
    for part in position_slices(ids, variant.POSITIONS):
        with torch.no_grad():
            theirs = teacher.logits(wanted[:, part], ids[:, part])
        ours = student.logits(leaf[:, part], ids[:, part])
        here = None if counted is None else counted[:, part]
        divergence, gradient = divergence_and_gradient(ours, theirs, scale / count, here)
        torch.autograd.backward(ours, gradient)
        total += divergence
    assert leaf.grad is not None
    student.skippable.backward(states, leaf.grad)
    return total / count


def learning_rate(peak: float, share: float, steps: int) -> float:
    """Return the learning rate of the step after `steps`, with `share` of the budget used.

    It rises linearly over the first steps, while Adam's moments are unreliable, and falls along a cosine to 0 at the
    end of the budget.
    """
    return peak * min((steps + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
