"""Score the logits of sequences, with few of them in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.memory_budget import settings_for
from sleb_plugins import LogitMetric

if TYPE_CHECKING:
    from sleb_cli.engine.forward.skipping import SkippableModel


@dataclass(eq=False)
class Predictions:
    """The logits of a batch, computed a slice of positions at a time from the states that leave the
    last block.
    """

    skippable: SkippableModel
    ids: Tensor
    hidden: Tensor

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """Return logits by sequences and positions, as a tensor of all logits does."""
        hidden = self.hidden[where].to(self.skippable.places[-1])
        return self.skippable.head(hidden, self.ids[where])


@dataclass(eq=False)
class Narrowed:
    """The logits of some tokens alone, in this order; `tokens` is int64 [tokens]."""

    logits: Logits
    tokens: Tensor

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """Return logits by sequences and positions, as a tensor of all logits does."""
        logits = self.logits[where]
        return logits[..., self.tokens.to(logits.device)]


Logits = Tensor | Predictions | Narrowed
"""The logits of a batch; a model that only runs whole has them all at once."""


def position_slices(ids: Tensor, positions: int) -> list[slice]:
    """Slice the predicting positions of `ids`, [batch, positions], at most `positions` logits."""
    step = max(1, positions // len(ids))
    last = ids.shape[1] - 1
    return [slice(start, min(start + step, last)) for start in range(0, last, step)]


def float32_slices(logits: Tensor) -> list[slice]:
    """Slice logits, [rows, vocabulary], into pieces small enough to widen to float32."""
    step = max(1, settings_for(logits.device).widened_bytes // (4 * logits.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def score_logits(
    metric: LogitMetric,
    logits: Logits,
    ids: Tensor,
    dense: Logits | None = None,
    *,
    loss_mask: Tensor | None = None,
    positions: int | None = None,
) -> Tensor:
    """Return each sequence's mean score over the predicted tokens that count, float64 [batch].

    `loss_mask`, bool [batch, positions], says which tokens count as targets. Logits of at most
    `positions` positions, over all sequences, are computed at once.
    """
    scores = []
    rows = slice(None)
    targets = ids[:, 1:]  # the logits at a position predict the token after it
    for columns in position_slices(ids, positions or ids.numel()):
        dense_slice = None
        if dense is not None:
            dense_slice = dense[rows, columns]
        of_slice = score_positions(metric, logits[rows, columns], targets[:, columns], dense_slice)
        scores.append(of_slice)
    by_token = as_float64(torch.cat(scores, dim=1))  # [batch, positions - 1]
    if loss_mask is None:
        return by_token.mean(1)
    counted = loss_mask[:, 1:].to(by_token.device)
    return by_token.where(counted, 0.0).sum(1) / counted.sum(1)


def score_positions(
    metric: LogitMetric, logits: Tensor, targets: Tensor, dense: Tensor | None
) -> Tensor:
    """Score logits [batch, positions, vocabulary] slice by slice: float32 [batch, positions]."""
    flat = logits.flatten(0, 1)
    flat_targets = targets.flatten()
    scores = []
    for rows in float32_slices(flat):
        widened = None
        if dense is not None:
            widened = dense.flatten(0, 1)[rows].float()
        scores.append(metric.score_tokens(flat[rows].float(), flat_targets[rows], widened))
    return torch.cat(scores).view(targets.shape)
