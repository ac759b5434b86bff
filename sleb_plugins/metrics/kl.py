"""How far the predictions of the model without the block are from the dense model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import LogitMetric

if TYPE_CHECKING:
    from torch import Tensor


class KlDivergence(LogitMetric):
    """KL(dense || pruned) = sum over the vocabulary of p (log p - log q), in nats per token.

    p is the dense model's prediction, q the prediction without the candidate and all earlier removals. The metric sees
    every change of the predictions, even for tokens that the text does not contain. It is 0 for the dense model; on
    text that the dense model wrote it is, up to a constant, the expected loss. This is the loss of knowledge
    distillation (Hinton et al., arXiv 1503.02531, section 2) at temperature 1, used as a pruning criterion.
    """

    name = "kl"
    description = "KL divergence from the dense model's predictions, in nats per token"
    needs_dense_logits = True

    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Return KL(dense || pruned), [positions]."""
        assert dense_logits is not None
        log_p = dense_logits.log_softmax(-1)
        return divergence_terms(log_p.exp(), log_p, logits.log_softmax(-1)).sum(-1)


def divergence_terms(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q), in nats, whose sum over the vocabulary is KL(p || q); it overwrites `log_p`."""
    # Where a family masks a token, both logarithms are -inf and nothing is lost.
    return log_p.sub_(log_q).masked_fill_(p == 0, 0.0).mul_(p)
