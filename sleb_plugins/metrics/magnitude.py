"""The magnitude of a block's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import WeightMetric
from sleb_plugins.metrics.plain_weights import require_plain_weights

if TYPE_CHECKING:
    from torch import nn


class Magnitude(WeightMetric):
    """The sum of |w| over all parameters of the block (the L1 norm), in the units of the weights.

    "Mag" of Kim et al., Shortened LLaMA (arXiv 2402.02834), where block-level importance is evaluated; it uses no text.
    They found that it fails on LLaMA, whose first blocks have the smallest weights: a baseline.
    """

    name = "magnitude"
    description = "sum of the absolute weights of the block"

    def score_block(self, block: nn.Module, number: int) -> float:
        """Return the sum of |w|."""
        require_plain_weights(self.name, block)
        return sum(weight.detach().float().abs().sum().item() for weight in block.parameters())
