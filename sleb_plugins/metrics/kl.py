"""How far the predictions of the model without the block are from the dense model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import LogitMetric

if TYPE_CHECKING:
    from torch import Tensor


class KlDivergence(LogitMetric):
    """KL(dense || pruned) = sum over the vocabulary of p (log p - log q), in nats per token.

    p is what the dense model predicts, q what it predicts without the candidate and all earlier removals. It sees every
    change of the predictions, those of tokens that the text does not have included; it is 0 for the dense model, and on
    text that the dense model wrote it is, up to a constant, the expected loss. This is the loss of knowledge
    distillation (Hinton et al., arXiv 1503.02531, section 2) at temperature 1, taken as a pruning criterion.
    """

    name = "kl"
    description = "KL divergence from the dense model's predictions, in nats per token"
    needs_dense_logits = True

    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Return KL(dense || pruned), [positions]."""
        assert dense_logits is not None
        dense = dense_logits.log_softmax(-1)
        probability = dense.exp()
        # Where a family masks a token out, both logarithms are -inf, and nothing is lost.
        difference = (dense - logits.log_softmax(-1)).masked_fill(probability == 0, 0.0)
        return (probability * difference).sum(-1)
