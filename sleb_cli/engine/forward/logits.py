"""From hidden states or logits to a score for each sequence, with few logits in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_plugins import LogitMetric, PluginError

# Logits are widened to float32 in pieces of this size, which a CPU's caches and its allocator hand round.
WIDENED_BYTES = {"cpu": 4 << 20}
_WIDENED_ELSEWHERE = 256 << 20


def score_hidden_states(
    metric: LogitMetric,
    skippable: SkippableModel,
    hidden: Tensor,
    ids: Tensor,
    dense_hidden: Tensor | None = None,
    *,
    loss_mask: Tensor | None = None,
    positions: int,
) -> Tensor:
    """Give each sequence's mean score over its predicted tokens that count, float64 [batch].

    Args:
        metric: looks at logits.
        skippable: the model, whose head turns hidden states into logits.
        hidden: what leaves the last block, [batch, positions, hidden size].
        ids: the tokens, [batch, positions].
        dense_hidden: as `hidden`, of the dense model, where the metric asks for its logits.
        loss_mask: which tokens count where they are predicted, bool [batch, positions]; None for all.
        positions: how many positions' logits may exist at once, over all sequences.
    """
    step = max(1, positions // len(ids))
    scores = []
    for start in range(0, ids.shape[1] - 1, step):
        stop = min(start + step, ids.shape[1] - 1)
        here = ids[:, start:stop]
        dense = None if dense_hidden is None else skippable.head(dense_hidden[:, start:stop], here)
        logits = skippable.head(hidden[:, start:stop], here)
        scores.append(score_positions(metric, logits, ids[:, start + 1 : stop + 1], dense))
    return _mean(torch.cat(scores, dim=1), loss_mask)


def score_logits(
    metric: LogitMetric,
    logits: Tensor,
    ids: Tensor,
    dense_logits: Tensor | None = None,
    *,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Give each sequence's mean score over its predicted tokens that count, float64 [batch], from all of its logits."""
    dense = None if dense_logits is None else dense_logits[:, :-1]
    return _mean(score_positions(metric, logits[:, :-1], ids[:, 1:], dense), loss_mask)


def _mean(scores: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Average over the positions whose next token counts: [batch, positions - 1], loss_mask [batch, positions]."""
    if loss_mask is None:
        return scores.double().mean(1)
    targets = loss_mask[:, 1:]
    return scores.double().where(targets, 0.0).sum(1) / targets.sum(1)


def score_positions(metric: LogitMetric, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
    """Score positions in pieces: [batch, positions, vocabulary] to float32 [batch, positions]."""
    flat, flat_targets = logits.flatten(0, 1), targets.flatten()
    flat_dense = None if dense is None else dense.flatten(0, 1)
    step = max(1, WIDENED_BYTES.get(logits.device.type, _WIDENED_ELSEWHERE) // (4 * logits.shape[-1]))
    scores = []
    for start in range(0, len(flat), step):
        piece = slice(start, start + step)
        widened = None if flat_dense is None else flat_dense[piece].float()
        scores.append(metric.score_tokens(flat[piece].float(), flat_targets[piece], widened))
        require_shape(metric.name, scores[-1], flat_targets[piece].shape)
    return torch.cat(scores).view(targets.shape)


def require_shape(metric: str, scores: Tensor, shape: torch.Size) -> None:
    """Make sure that a metric gave one score for each position.

    Raises:
        PluginError: it did not.
    """
    found = getattr(scores, "shape", None)
    if found != shape:
        raise PluginError(
            f"The metric {metric!r} gave scores of shape {found}, where one for each of {list(shape)} belongs.",
            hint="Tell its author.",
        )
