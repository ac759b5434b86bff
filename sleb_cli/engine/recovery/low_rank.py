"""Train only a low-rank change to each weight (LoRA, Hu et al., arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RANK = 64
REFERENCE_SIZE = 0.19
"""The root mean square of SmolLM2-135M's weights, for which the learning rate was chosen."""
INITIAL = 1 / 24
"""The largest entry of A at first."""
BETAS = (0.9, 0.95)
ROWS_AT_ONCE = 256
CLIP = 1.0
"""The largest norm of a gradient; a larger one is scaled down to it."""


def rank_of(shape: Sequence[int]) -> int:
    """Return the rank of the change to a weight [..., out, in]: at most half its own, and 0 for a
    vector.
    """
    if len(shape) < 2:
        return 0
    return min(RANK, shape[-2] // 2, shape[-1] // 2)


def trained_numbers(shape: Sequence[int]) -> int:
    """Count the entries of A and B for a weight of this shape."""
    return math.prod(shape[:-2]) * rank_of(shape) * sum(shape[-2:])


def _scale_of(weight: Tensor) -> float:
    # A step of Adam moves each trained entry by about the learning rate, whatever its gradient.
    # Families differ by more than ten times in the size of their weights, so steps are made
    # relative to the sizes of W and of its inputs.
    root_mean_square = float(weight.detach().float().pow(2).mean().sqrt())
    input_size = math.sqrt(weight.shape[-1]) * INITIAL
    return root_mean_square / REFERENCE_SIZE / input_size


@dataclass(frozen=True)
class _Change:
    """The change `scale` B A to a weight; A (`down`), B (`up`) and gradients view flat tensors."""

    scale: float
    weight: nn.Parameter
    original: Tensor
    down: Tensor
    down_gradient: Tensor
    up: Tensor
    up_gradient: Tensor

    def take_gradient(self, weight: nn.Parameter) -> None:
        gradient = weight.grad
        weight.grad = None
        assert gradient is not None
        up = self.up.to(gradient.dtype)
        down = self.down.to(gradient.dtype)
        self.down_gradient.add_(up.mT @ gradient, alpha=self.scale)
        self.up_gradient.add_(gradient @ down.mT, alpha=self.scale)


class LowRank:
    """Changes B A to some weights, and the AdamW that moves them, in float32.

    B is [..., out, rank], and A [..., rank, in].

    The weights themselves hold W + scale * B A, rounded to `stored`: the model's code runs
    unchanged, nothing needs merging, and the measured weights are the written ones. The `originals`
    are the W, and are not changed. Gradients of weights become gradients of B and A one by one, so
    at most one whole gradient exists. At first every B is 0.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], originals: Sequence[Tensor], stored: torch.dtype
    ) -> None:
        self._stored = stored
        size = sum(trained_numbers(weight.shape) for weight in weights)
        device = weights[0].device
        # One flat tensor for all, so that a fused step is one pass over memory.
        self.values = nn.Parameter(torch.zeros(size, device=device))
        self._gradient = torch.zeros_like(self.values)
        self._adam = torch.optim.AdamW([self.values], betas=BETAS, weight_decay=0.0, fused=True)
        # As its first step makes it, but at once, so that a saved state has the same tensors at any
        # time.
        self._adam.state[self.values] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(self.values),
            "exp_avg_sq": torch.zeros_like(self.values),
        }
        self._changes: list[_Change] = []
        self._taken = 0
        generator = torch.Generator().manual_seed(0)
        for weight, original in zip(weights, originals, strict=True):
            *stack, rows, columns = weight.shape
            rank = rank_of(weight.shape)
            down, down_gradient = self._take(*stack, rank, columns)
            up, up_gradient = self._take(*stack, rows, rank)
            uniform = 2 * torch.rand(down.shape, generator=generator) - 1
            down.copy_(INITIAL * uniform)
            change = _Change(
                _scale_of(weight), weight, original, down, down_gradient, up, up_gradient
            )
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(change.take_gradient)  # type: ignore[no-untyped-call]
            self._changes.append(change)

    def _take(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Return the next part of the flat values and of their gradient in this shape."""
        span = slice(self._taken, self._taken + math.prod(shape))
        self._taken = span.stop
        return self.values.data[span].view(shape), self._gradient[span].view(shape)

    def take_gradient(self) -> Tensor:
        """Return the sum of the gradients since the last call, float32 in the order of `values`."""
        gradient = self._gradient.clone()
        self._gradient.zero_()
        return gradient

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step of AdamW without decay (Loshchilov and Hutter, 2019)."""
        norm = float(gradient.norm())
        self.values.grad = gradient * min(1.0, CLIP / (norm + 1e-6))
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self.values.grad = None
        self.write_weights()

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors to save; a process that continues copies the saved values into its own."""
        return {"values": self.values.data, **self._adam.state[self.values]}

    @torch.no_grad()
    def write_weights(self) -> None:
        """Update the weights after a change of `values`."""
        for change in self._changes:
            # A matrix in pieces, whose intermediate results stay in the cache of the processor.
            size = len(change.weight)
            rows = size
            if change.weight.dim() == 2:
                rows = ROWS_AT_ONCE
            for start in range(0, size, rows):
                piece = slice(start, start + rows)
                changed = change.up[piece] @ change.down
                changed.mul_(change.scale)
                changed.add_(change.original[piece])
                change.weight[piece].copy_(changed.to(self._stored))
