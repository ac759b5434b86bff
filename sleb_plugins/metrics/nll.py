"""SLEB's own metric: the calibration loss of the model without the block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import LogitMetric

if TYPE_CHECKING:
    from torch import Tensor


class NegativeLogLikelihood(LogitMetric):
    """Mean negative log-likelihood in nats per token (Song et al., ICML 2024, section 3.2, metric
    3).
    """

    name = "nll"
    description = "calibration loss without the block, in nats per token"
    unit = "nats per token"

    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Return -log p(target), [positions]."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets, reduction="none")
