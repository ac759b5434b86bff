"""Powers of two that keep float16 gradients in range: loss scaling (Micikevicius et al., arXiv
1710.03740, 3.2).

The gradient of a mean over thousands of tokens is smaller than the smallest float16 number almost
everywhere, so it is computed of a multiple of the loss, and divided by that in float32. A power of
two changes no digit. Other data types have the range of float32, and a scale of 1.
"""

from __future__ import annotations

import math

import torch

BACKOFF = 2.0**-4
"""The factor that lowers a scale after an overflow."""
MIN_SCALE = 2.0**-24


def starting_scale(dtype: torch.dtype, tokens: int) -> float:
    """Return a scale at which the gradient of a mean over `tokens` is about as large as a single
    token's.
    """
    return 2.0 ** math.ceil(math.log2(max(1, tokens))) if dtype is torch.float16 else 1.0
