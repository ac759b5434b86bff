"""Train only a low-rank change to each weight (LoRA, Hu et al., arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sleb_cli.engine.recovery.flat_weights import FlatWeights, root_mean_square

RANK = 64
REFERENCE_SIZE = 0.19
"""The root mean square of SmolLM2-135M's weights, for which the learning rate was chosen."""
INITIAL = 1 / 24
"""The largest entry of A at first."""
ROWS_AT_ONCE = 256


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
