"""What metrics of weights can read: numbers, not the packed form of a quantized checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def require_plain_weights(metric: str, block: nn.Module) -> None:
    """Check that no matrix of a block is packed.

    Raises:
        UsageError: one is, so what `metric` would compute means nothing.
    """
    for name, tensor in block.state_dict().items():
        is_plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if tensor.dim() > 1 and str(tensor.dtype) != "torch.bool" and not is_plain:
            raise UsageError(
                f"{metric} reads the weights, but {name} is packed ({tensor.dtype}).",
                hint="Use a metric of what the model computes, such as nll, or search the model it was quantized from.",
            )
