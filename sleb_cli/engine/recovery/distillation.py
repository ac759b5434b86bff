"""The gradient of the divergence from the dense model, with no more logits in memory than a stretch of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.recovery.variant import Variant, pieces, stretches

BETAS = (0.9, 0.95)
CLIP = 1.0
"""The longest gradient that is followed as it is; longer ones are shortened to it."""


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
    student.gated.backward(states, gathered.grad)
    return total / count


def learning_rate(peak: float, share: float, warmup: float = 0.05) -> float:
    """Give the learning rate when this share of the budget is used: up in a line, then down along a cosine, to 0."""
    return peak * min(share / warmup, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


class Masters:
    """Float32 copies of parameters, end to end in one tensor, and the AdamW that moves them.

    In bfloat16 most steps would be rounded away; the copies add them up, and the parameters follow.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        flat = torch.cat([parameter.detach().float().flatten() for parameter in self.parameters])
        self.values = nn.Parameter(flat)
        # Fused, it is one pass over memory: on a CPU, several would take as long as a tenth of the step's own work.
        self._adam = torch.optim.AdamW([self.values], betas=BETAS, weight_decay=0.0, fused=True)

    def gradient(self) -> Tensor:
        """Take the parameters' gradients, zero where there is none, in one float32 tensor."""
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return torch.cat([gradient.float().flatten() for gradient in taken])

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """Move the copies by a step of AdamW without decay (Loshchilov and Hutter, 2019), and the parameters after."""
        gradient *= min(1.0, CLIP / (float(gradient.norm()) + 1e-6))
        self.values.grad = gradient
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self.values.grad = None
        self.place()

    def state(self) -> dict[str, Tensor]:
        """Give all that a later process needs to go on."""
        moments: dict[str, Tensor] = self._adam.state[self.values]
        return {"values": self.values.data} | moments

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        moments = {name: tensor.to(self.values.device) for name, tensor in state.items()}
        self.values.data = moments.pop("values")
        self._adam.state[self.values] = moments
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """Give the parameters the copies' values, rounded to their data types."""
        start = 0
        for parameter in self.parameters:
            parameter.copy_(self.values[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
