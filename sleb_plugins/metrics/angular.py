"""By which angle a block, or a span of blocks, turns the hidden states that pass through it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sleb_plugins.metric import HiddenStateMetric

if TYPE_CHECKING:
    from torch import Tensor


class AngularDistance(HiddenStateMetric):
    """arccos(cos(entering, leaving)) / pi, in half-turns: 0 for the same direction, 1 for the opposite one.

    Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887, section 3.2), who look at a
    text's last token only; here all positions are averaged, which costs no further pass and scatters less. With
    `--strategy contiguous` this is their way to choose a span (PruneMe).
    """

    name = "angular"
    description = "angle between what enters and what leaves the block, in half-turns"

    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """Return the angle in half-turns, [batch, positions]."""
        a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (entering, leaving))
        # arccos is blind to small angles in float32: cos rounds to 1. The half-angle's tangent is not.
        half: Tensor = (a - b).norm(dim=-1).atan2((a + b).norm(dim=-1))
        return half * (2 / math.pi)
