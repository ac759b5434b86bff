"""The magnitude of a block's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.errors import UsageError
from sleb_plugins.metric import WeightMetric

if TYPE_CHECKING:
    from torch import nn


class Magnitude(WeightMetric):
    """The sum of |w| over all parameters of the block (the L1 norm), in the units of the weights.

    "Mag" of Kim et al., Shortened LLaMA (arXiv 2402.02834), where block-level importance is
    evaluated; it uses no text. They found that it fails on LLaMA, whose first blocks have the
    smallest weights: a baseline.
    """

    name = "magnitude"
    description = "sum of the absolute weights of the block"

    def score_block(self, block: nn.Module, number: int) -> float:
        """Return the sum of |w|."""
        # The bytes of a packed matrix are no weights, so their sum would mean nothing.
        for name, tensor in block.state_dict().items():
            is_plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1
            if tensor.dim() > 1 and str(tensor.dtype) != "torch.bool" and not is_plain:
                raise UsageError(
                    f"{self.name} reads the weights, but {name} is packed ({tensor.dtype}).",
                    hint="Use a metric of what the model computes, such as nll, or search the "
                    "model it was quantized from.",
                )
        return sum(weight.detach().float().abs().sum().item() for weight in block.parameters())
