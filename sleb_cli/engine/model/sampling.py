"""Sample tokens from the model's own distribution, a few times as fast as `torch.multinomial`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64

_CHUNK_TOKENS = 64
"""Tokens of which only the sum of the probabilities is looked at first."""


class Sampler:
    """A logits processor that leaves one token of each row to choose from, drawn among all but the forbidden ones.

    A greedy generation with it samples, at temperature 1. transformers draws with `torch.multinomial`, which takes a
    random number for each token of the vocabulary; this takes one for each row.
    """

    def __init__(self, forbidden: Collection[int] = ()) -> None:
        self.forbidden = sorted(forbidden)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [batch, vocabulary] with 0 for the drawn tokens and -inf for all others, in place.

        Raises:
            ValueError: they are no logits of a distribution.
        """
        # A tokenizer may have more tokens than the model.
        scores[:, [token for token in self.forbidden if token < scores.shape[-1]]] = -torch.inf
        tokens = sample(scores.softmax(-1, dtype=torch.float32))
        return scores.fill_(-torch.inf).scatter_(-1, tokens[:, None], 0.0)


def sample(probabilities: Tensor) -> Tensor:
    """Draw a token from each row of [batch, vocabulary], int64 [batch].

    A number below the sum of a row says in which chunk of tokens the draw falls, and then on which token in it. Sums
    are added up in float64, so the rarest of 262,144 tokens count.

    Raises:
        ValueError: a row holds NaN, or its sum is infinite or 0.
    """
    vocabulary = probabilities.shape[-1]
    padded = torch.nn.functional.pad(probabilities, (0, -vocabulary % _CHUNK_TOKENS))
    chunks = padded.view(len(probabilities), -1, _CHUNK_TOKENS)
    sums = as_float64(chunks.sum(-1))
    total = sums.sum(-1)
    wrong = total[~(total.isfinite() & (total > 0))]
    if len(wrong):
        raise ValueError(f"a row of probabilities sums to {wrong[0]:g}")
    share = torch.rand(len(sums), dtype=torch.float64, device=sums.device)
    chunk, share = _drawn(sums, share)
    rows = torch.arange(len(sums), device=probabilities.device)
    of_chunk = as_float64(chunks[rows, chunk.to(rows.device)])
    token, _ = _drawn(of_chunk, share)
    return (chunk * _CHUNK_TOKENS + token).to(probabilities.device)


def _drawn(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column of [batch, columns] on which this share of each row's sum falls, and how far into it."""
    ends = weights.cumsum(-1)
    at = (share * ends[:, -1])[:, None]
    column = torch.searchsorted(ends, at, right=True)
    # Rounding may lead behind the last column that has a weight.
    last = (ends < ends[:, -1:]).sum(-1, keepdim=True)
    column = torch.minimum(column, last)
    weight = weights.gather(-1, column)
    into = (at - (ends.gather(-1, column) - weight)) / weight
    return column[:, 0], into[:, 0].clamp(0, 1)
