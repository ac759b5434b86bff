"""The first-order change of the loss if each of a block's weights were zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import WeightMetric
from sleb_plugins.metrics.plain_weights import require_plain_weights

if TYPE_CHECKING:
    from torch import nn


class Taylor(WeightMetric):
    """The sum of |w dL/dw| over all parameters of the block, in nats per token.

    L is the mean loss over the calibration text. |w dL/dw| is the first-order estimate of the change of L when one
    weight is set to zero (Molchanov et al., arXiv 1906.10771, section 3.1); its sum over a block is "Taylor" of Kim et
    al., Shortened LLaMA (arXiv 2402.02834), where block-level importance is evaluated.
    """

    name = "taylor"
    description = "sum of |weight x gradient of the calibration loss| over the block"
    needs_gradients = True

    def score_block(self, block: nn.Module, number: int) -> float:
        """Return the sum of |w dL/dw|; a parameter without a gradient counts as 0."""
        require_plain_weights(self.name, block)
        return sum(
            (weight.detach().float() * weight.grad.float()).abs().sum().item()
            for weight in block.parameters()
            if weight.grad is not None
        )
