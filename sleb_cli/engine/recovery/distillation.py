"""The gradient of the divergence from the dense model, with no more logits in memory than a stretch of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.recovery.variant import Variant, pieces, stretches

WARMUP_STEPS = 20


class Divergence(torch.autograd.Function):
    """KL(teacher || student) in nats, summed over positions, from logits [..., vocabulary].

    What backpropagation needs, softmax(student) - softmax(teacher), is made on the way, piece by piece, in the
    student's data type: of float32 there is never more than a piece.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """Give the sum, float32."""
        ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
        gradient, total = torch.empty_like(ours), torch.zeros((), device=ours.device)
        step = pieces(ours)
        for start in range(0, len(ours), step):
            log_q = ours[start : start + step].float().log_softmax(-1)
            log_p = theirs[start : start + step].float().log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            gradient[start : start + step] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient.view_as(student))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Give the gradient for the student's logits."""
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].dtype), None


def distill(
    teacher: Variant, student: Variant, ids: Tensor, wanted: Tensor, start: tuple[int, Tensor] | None = None
) -> float:
    """Add the gradient of the mean divergence on these tokens, [batch, positions], to the student's parameters.

    `wanted` are the teacher's final states there. The logits' part of the gradient is gathered at the student's final
    states, stretch by stretch; one pass goes down from there. Gives the mean over the predicting positions, in nats.
    """
    states = student.final_states(ids, start)
    gathered = states.detach().requires_grad_()
    count, total = len(ids) * (ids.shape[1] - 1), 0.0
    for part in stretches(ids):
        with torch.no_grad():
            theirs = teacher.logits(wanted[:, part], ids[:, part])
        ours = student.logits(gathered[:, part], ids[:, part])
        divergence = Divergence.apply(ours, theirs)  # type: ignore[no-untyped-call]
        (divergence / count).backward()
        total += float(divergence.detach())
    assert gathered.grad is not None
    student.skippable.backward(states, gathered.grad)
    return total / count


def learning_rate(peak: float, share: float, steps: int) -> float:
    """Give the learning rate after so many steps, when this share of the budget is used.

    It goes up in a line over the first steps, whose moments know too little to be followed far, and down along a cosine
    to 0 at the end of the budget.
    """
    return peak * min((steps + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
