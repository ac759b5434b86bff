"""The numbers that a training moves, all in one flat tensor, and the AdamW that moves them.

Of a language model, they are low-rank changes (LoRA, Hu et al., arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
CLIP = 1.0
"""The largest norm of a gradient; a larger one is scaled down to it."""
RANK = 64
REFERENCE_SIZE = 0.19
"""The root mean square of SmolLM2-135M's weights, for which the learning rate was chosen."""
INITIAL = 1 / 24
"""The largest entry of A at first."""


class FlatWeights:
    """Trained numbers in float32; one flat tensor, so that a fused step is one pass over memory.

    Attributes:
        gradient: the sum of the gradients since the last step, in the order of `values`.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.values = nn.Parameter(torch.zeros(size, device=device))
        self.gradient = torch.zeros_like(self.values)
        self.values.grad = self.gradient
        self._adam = torch.optim.AdamW([self.values], betas=BETAS, weight_decay=0.0, fused=True)
        # As its first step makes it, but at once, so that a saved state has the same tensors at any
        # time.
        self._adam.state[self.values] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(self.values),
            "exp_avg_sq": torch.zeros_like(self.values),
        }
        self._taken = 0

    def _take(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Return the next part of the flat values and of their gradient in this shape."""
        span = slice(self._taken, self._taken + math.prod(shape))
        self._taken = span.stop
        return self.values.data[span].view(shape), self.gradient[span].view(shape)

    @torch.no_grad()
    def step(self, rate: float) -> bool:
        """Take a step of AdamW without decay (Loshchilov and Hutter, 2019), and zero the gradient.

        Returns:
            False if the gradient was not finite, so that no step was taken.
        """
        norm = float(self.gradient.norm())
        is_finite = math.isfinite(norm)
        if is_finite:
            if norm > CLIP:
                self.gradient.mul_(CLIP / norm)
            self._adam.param_groups[0]["lr"] = rate
            self._adam.step()
            self.write_weights()
        self.gradient.zero_()
        return is_finite

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors to save; a process that continues copies the saved values into its own."""
        return {"values": self.values.data, **self._adam.state[self.values]}

    def write_weights(self) -> None:
        """Update the weights after a change of `values`."""


def root_mean_square(weight: Tensor) -> float:
    """Return the size of a weight's entries."""
    return float(weight.detach().float().pow(2).mean().sqrt())


class WholeWeights(FlatWeights):
    """All numbers of some float32 parameters, which become views of the flat tensor."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__(sum(weight.numel() for weight in weights), weights[0].device)
        for weight in weights:
            values, gradient = self._take(*weight.shape)
            weight.data = values.copy_(weight.data)
            weight.requires_grad_(True)
            weight.grad = gradient  # to which passes add


@dataclass(frozen=True)
class _Relative:
    """The change `scale` * `values` to a weight."""

    weight: nn.Parameter
    original: Tensor
    scale: float
    values: Tensor
    gradient: Tensor

    def take_gradient(self, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        self.gradient.add_(weight.grad, alpha=self.scale)
        weight.grad = None


class RelativeWeights(FlatWeights):
    """Changes to all numbers of some weights, in steps relative to the size of each weight.

    The weights hold their sums with the originals, rounded to `stored`, so the measured weights are
    the written ones. At first every change is 0.
    """

    def __init__(self, weights: Sequence[nn.Parameter], stored: torch.dtype) -> None:
        super().__init__(sum(weight.numel() for weight in weights), weights[0].device)
        self._stored = stored
        self._changes: list[_Relative] = []
        for weight in weights:
            original = weight.data
            weight.data = original.clone()
            scale = root_mean_square(original) or 1.0  # a bias may be 0
            change = _Relative(weight, original, scale, *self._take(*weight.shape))
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(change.take_gradient)  # type: ignore[no-untyped-call]
            self._changes.append(change)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Update the weights after a change of `values`."""
        for change in self._changes:
            changed = change.original + change.scale * change.values
            change.weight.copy_(changed.to(self._stored))


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
    input_size = math.sqrt(weight.shape[-1]) * INITIAL
    return root_mean_square(weight) / REFERENCE_SIZE / input_size


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


class LowRank(FlatWeights):
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
        super().__init__(size, weights[0].device)
        self._changes: list[_Change] = []
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

    @torch.no_grad()
    def write_weights(self) -> None:
        """Update the weights after a change of `values`."""
        for change in self._changes:
            # In the model's own data type: the product is rounded, but it is small beside W.
            dtype = change.weight.dtype
            product = change.up.to(dtype) @ change.down.to(dtype)
            changed = torch.add(change.original, product, alpha=change.scale)
            change.weight.copy_(changed.to(self._stored))
