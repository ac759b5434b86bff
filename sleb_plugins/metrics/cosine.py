"""The cosine distance between a block's input and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import HiddenStateMetric

if TYPE_CHECKING:
    from torch import Tensor


class CosineDistance(HiddenStateMetric):
    """One minus the cosine between a block's input and output (Men et al., ShortGPT, arXiv
    2403.03853).
    """

    name = "cosine"
    description = "1 - cosine similarity of the block's input and output"

    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """Return 1 - cos(entering, leaving), [batch, positions]."""
        dot: Tensor = (entering * leaving).sum(-1)
        norms = (entering.square().sum(-1) * leaving.square().sum(-1)).sqrt()
        return dot.div(norms.clamp_min(1e-12)).neg().add(1.0)
