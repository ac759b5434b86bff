"""The angle by which a block, or a span of blocks, turns the hidden states."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sleb_plugins.metric import HiddenStateMetric

if TYPE_CHECKING:
    from torch import Tensor


class AngularDistance(HiddenStateMetric):
    """arccos(cos(entering, leaving)) / pi, in half-turns: 0 for the same direction, 1 for the
    opposite one.

    Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887, section
    3.2), who use a text's last token only; averaging over all positions costs no extra pass and
    varies less. With `--strategy contiguous`, this is how they choose a span (PruneMe).
    """

    name = "angular"
    description = "angle between the block's input and output, in half-turns"
    unit = "half-turns"

    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """Return the angle in half-turns, [batch, positions]."""
        a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (entering, leaving))
        # arccos loses small angles in float32, where cos rounds to 1; the tangent of the half-angle
        # does not.
        half: Tensor = (a - b).norm(dim=-1).atan2((a + b).norm(dim=-1))
        return half * (2 / math.pi)
