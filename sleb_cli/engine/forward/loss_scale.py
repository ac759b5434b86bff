"""Powers of two that keep float16 gradients in range: loss scaling (Micikevicius et al., arXiv 1710.03740, 3.2).

The gradient of a mean over thousands of tokens is smaller than the smallest float16 number almost everywhere, so it is
computed of a multiple of the loss, and divided by that in float32. A power of two changes no digit. Other data types
have the range of float32, and a scale of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BACKOFF = 2.0**-4
"""By how much a scale is lowered after an overflow."""
LOWEST = 2.0**-24


def starting_scale(dtype: torch.dtype, tokens: int) -> float:
    """Return a scale for the gradient of a mean over this many tokens: about that of a single one."""
    return 2.0 ** math.ceil(math.log2(max(1, tokens))) if dtype is torch.float16 else 1.0


def largest_in_range(gradient: Tensor) -> float:
    """Return the power of two that brings the largest number of a float16 gradient between 1 and 2; else 1."""
    largest = float(gradient.abs().amax()) if gradient.dtype is torch.float16 and gradient.numel() else 0.0
    return 2.0 ** -math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0


def without_overflow(backward: Callable[[float], object], leaves: Sequence[Tensor], scale: float) -> float:
    """Call `backward` with a scale, and with lower ones until it leaves finite gradients; return the last scale.

    If no scale does, the numbers of the model itself are not finite, which whoever reads the gradients will find.
    """
    while True:
        backward(scale)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None and leaf.grad.dtype is torch.float16]
        if scale <= LOWEST or all(bool(gradient.isfinite().all()) for gradient in gradients):
            return scale
        for leaf in leaves:
            leaf.grad = None
        scale *= BACKOFF
