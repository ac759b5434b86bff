"""How far the predictions of the model without the block are from the dense model's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from sleb_plugins.metric import LogitMetric

if TYPE_CHECKING:
    from torch import Tensor


class KlDivergence(LogitMetric):
    """KL(dense || pruned) = sum over the vocabulary of p (log p - log q), in nats per token.

    p is the dense model's prediction, q the prediction without the candidate and all earlier
    removals. The metric sees every change of the predictions, even for tokens that the text does
    not contain. It is 0 for the dense model; on text that the dense model wrote it is, up to a
    constant, the expected loss. This is the loss of knowledge distillation (Hinton et al., arXiv
    1503.02531, section 2) at temperature 1, used as a pruning criterion.
    """

    name = "kl"
    description = "KL divergence from the dense model's predictions, in nats per token"
    unit = "nats per token"
    needs_dense_logits = True

    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Return KL(dense || pruned), [positions]."""
        assert dense_logits is not None
        return compare_logits(dense_logits, logits).divergence


class Comparison(NamedTuple):
    """KL(p || q) of each position in nats, both distributions [..., vocabulary], and the logsumexp
    of q's logits.
    """

    divergence: Tensor
    p: Tensor
    q: Tensor
    log_sum_q: Tensor


def compare_logits(logits_p: Tensor, logits_q: Tensor) -> Comparison:
    """Compare two models' predictions, from the logits of both, [..., vocabulary].

    KL(p || q) is sum p (logits_p - logits_q) - (logsumexp(logits_p) - logsumexp(logits_q)): fewer
    passes over the vocabulary than two log_softmax and an exponential take.
    """
    p, log_sum_p = _normalized(logits_p)
    q, log_sum_q = _normalized(logits_q)
    # Where a family masks a token, both logits are -inf: their difference is NaN, and nothing is
    # lost.
    difference = (logits_p - logits_q).nan_to_num_(0.0, posinf=math.inf, neginf=-math.inf)
    # A product of two vectors by matrix multiplication takes torch ten times as long on two cores.
    values = difference.mul_(p).sum(-1)
    return Comparison(values - (log_sum_p - log_sum_q), p, q, log_sum_q)


def _normalized(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of logits and their logsumexp."""
    probabilities = logits.softmax(-1)
    # log p = logit - logsumexp, of the likeliest token: a maximum is quicker than another pass of
    # exponentials.
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()
