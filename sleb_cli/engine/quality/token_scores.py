"""Score each token of a text: how well a model predicts it, and how far from the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import Logits, float32_slices, position_slices
from sleb_cli.engine.statistics import clustered_mean
from sleb_cli.results import DivergenceRecord

MIN_LOG_PROBABILITY = -1e4

Scores = Mapping[str, Tensor]
"""One value for each prediction, by name; all tensors are [windows, positions] on the CPU.

- `nll`: the negative log-likelihood of the right token, in nats.
- `divergence`: KL(dense || this model), in nats; not of the dense model.
- `same_top`: whether the first choice is the dense model's; not of the dense model.
- `accepted`: the probability that the dense model keeps a token that this one drafts; not of the
dense model.
"""


def join_models(parts: Sequence[Sequence[Scores]], dim: int = 0) -> list[Scores]:
    """Join the scores of each model on several groups of windows, or of positions (`dim` 1)."""
    joined: list[Scores] = []
    for of_model in zip(*parts, strict=True):
        names = of_model[0].keys()
        joined.append(
            {name: torch.cat([scores[name] for scores in of_model], dim) for name in names}
        )
    return joined


def score_tokens(ids: Tensor, models: Sequence[Logits], positions: int) -> list[Scores]:
    """Score the dense model, which is first, and others on a batch, a slice of logits at a time.

    `ids` are [batch, positions].
    """
    scored = []
    for columns in position_slices(ids, positions):
        targets = ids[:, 1:][:, columns]
        logits = [model[:, columns].flatten(0, 1) for model in models]
        rows = []
        for piece in float32_slices(logits[0]):  # small slices are widened
            of_piece = [model[piece] for model in logits]
            rows.append(_score_rows(of_piece, targets.flatten()[piece]))
        of_slice = []
        for scores in join_models(rows):
            shaped = {name: value.view(targets.shape).cpu() for name, value in scores.items()}
            of_slice.append(shaped)
        scored.append(of_slice)
    return join_models(scored, dim=1)


def _score_rows(logits: Sequence[Tensor], targets: Tensor) -> list[Scores]:
    # Logits are [rows, vocabulary], the dense model's first.
    log_p = _log_probabilities(logits[0])
    scored: list[Scores] = [{"nll": _losses(log_p, targets)}]
    if len(logits) == 1:
        return scored
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(p, log_p)
    dense_best = log_p.argmax(-1)
    for model in logits[1:]:
        log_q = _log_probabilities(model)
        scores = {
            "nll": _losses(log_q, targets),
            # Rounding may leave a little less than zero.
            "divergence": (negative_entropy - torch.linalg.vecdot(p, log_q)).clamp_(min=0),
            "same_top": log_q.argmax(-1) == dense_best,
            "accepted": torch.minimum(p, log_q.exp()).sum(-1),
        }
        scored.append(scores)
    return scored


def _log_probabilities(logits: Tensor) -> Tensor:
    # Families that mask tokens give them -inf, and 0 times that is NaN.
    return logits.float().log_softmax(-1).clamp_(min=MIN_LOG_PROBABILITY)


def _losses(log_q: Tensor, targets: Tensor) -> Tensor:
    return -log_q.gather(-1, targets[:, None])[:, 0]


def window_losses(scores: Scores, counted: Tensor) -> tuple[float, ...]:
    """Return the mean loss over the counted tokens of each window, in nats per token."""
    losses = scores["nll"].double().where(counted, 0.0).sum(1) / counted.sum(1)
    return tuple(losses.tolist())


def divergence_record(
    pruned: Scores, dense: Scores, counted: Tensor, clusters: Tensor
) -> DivergenceRecord:
    """Summarize the divergence from the dense model, as `llama-perplexity --kl-divergence` does."""
    divergence = pruned["divergence"][counted].double()
    mean = clustered_mean(divergence, clusters[counted])
    before = dense["nll"][counted].double().neg().exp()
    change = pruned["nll"][counted].double().neg().exp() - before
    # torch's own function refuses more than 16 million values.
    median, p90, p99 = np.quantile(divergence.numpy(), (0.5, 0.9, 0.99)).tolist()
    return DivergenceRecord(
        mean=mean.mean,
        standard_error=mean.standard_error,
        median=median,
        p90=p90,
        p99=p99,
        maximum=float(divergence.max()),
        probability_change_rms=math.sqrt(float(change.square().mean())),
        same_top=float(pruned["same_top"][counted].double().mean()),
        accepted=float(pruned["accepted"][counted].double().mean()),
    )
