"""The tokens that two models have in common, by their text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import Logits, Narrowed
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.text.windows import EvaluationWindows

SHARED = 0.9
"""Vocabularies that share less of the smaller one come from different tokenizers."""
ENOUGH_WINDOWS = 0.5
"""If both tokenizers read less of a text alike, its tokens are not compared."""


@dataclass(frozen=True, eq=False)
class SharedTokens:
    """The numbers of the shared tokens in each model, int64 [tokens], in the same order.

    Where all that a model predicts is shared, in this order, `is_whole`.
    """

    dense: Tensor
    other: Tensor
    is_whole: bool

    def of_other(self, ids: Tensor) -> Tensor:
        """Return the other model's numbers of tokens; -1 for tokens that it lacks."""
        if self.is_whole:
            return ids
        return _translate(ids, self.dense, self.other)

    def places(self, ids: Tensor) -> Tensor:
        """Return the places of the dense model's tokens among the shared ones."""
        if self.is_whole:
            return ids
        return _translate(ids, self.dense, torch.arange(len(self.dense)))

    def narrow(self, logits: Logits, *, dense: bool) -> Logits:
        """Return the logits of the shared tokens alone, in their order."""
        if self.is_whole:
            return logits
        return Narrowed(logits, self.dense if dense else self.other)


def _translate(ids: Tensor, old: Tensor, new: Tensor) -> Tensor:
    size = max(int(ids.max()), int(old.max())) + 1
    table = torch.full((size,), -1)
    table[old] = new
    return table[ids.cpu()].to(ids.device)


def share_tokens(
    dense: tuple[Any, Architecture], other: tuple[Any, Architecture]
) -> SharedTokens | None:
    """Match the vocabularies of two tokenizers by text; None if they share too little."""
    (dense_tokens, dense_rows), (other_tokens, other_rows) = map(_vocabulary, (dense, other))
    pairs = []
    for token, number in dense_tokens.items():
        if token in other_tokens:
            pairs.append((number, other_tokens[token]))
    if len(pairs) < SHARED * min(len(dense_tokens), len(other_tokens)):
        return None
    pairs.sort()
    numbers = torch.tensor(pairs)
    same = torch.equal(numbers[:, 0], numbers[:, 1])
    all_shared = len(pairs) == len(dense_tokens) == len(other_tokens)
    is_whole = same and all_shared and dense_rows == other_rows
    return SharedTokens(numbers[:, 0], numbers[:, 1], is_whole)


def _vocabulary(model: tuple[Any, Architecture]) -> tuple[dict[str, int], int]:
    # Numbers beyond the model's rows are tokens of the tokenizer alone.
    tokenizer, architecture = model
    rows: int = architecture.text_config.vocab_size
    tokens = {token: number for token, number in tokenizer.get_vocab().items() if number < rows}
    return tokens, rows


def read_alike(
    windows: EvaluationWindows, shared: SharedTokens, dense: Any, other: Any
) -> EvaluationWindows | None:
    """Return the windows that both tokenizers read alike; None if too few are."""
    translated = shared.of_other(windows.ids)
    alike = (translated >= 0).all(1)
    text = windows.text
    if not text.conversations:
        alike &= _cut_alike(windows, shared, dense, other)
    if alike.double().mean() < ENOUGH_WINDOWS:
        return None
    return windows.select(alike)


def _cut_alike(windows: EvaluationWindows, shared: SharedTokens, dense: Any, other: Any) -> Tensor:
    """Return for each window whether the other tokenizer cuts its text into the same tokens."""
    content = windows.text.content
    # Slow tokenizers do not tell where tokens are: then the number of tokens before must agree.
    by_offset = dense.is_fast and other.is_fast
    special = windows.bos != "windows"  # otherwise the BOS stands before each window's text
    place = partial(_place, content=content, special=special, by_offset=by_offset)
    ids, starts, added = place(dense)
    other_ids, other_starts, _ = place(other)
    translated = shared.of_other(torch.tensor(ids)).tolist()
    in_other = set(zip(other_starts, other_ids, strict=True))
    same = torch.tensor([token in in_other for token in zip(starts, translated, strict=True)])
    same |= torch.tensor(added, dtype=torch.bool)
    count, length = windows.ids.shape
    if not special:
        length -= 1
    return same[: count * length].view(count, length).all(1)


def _place(
    tokenizer: Any, content: str, *, special: bool, by_offset: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of a text, where each begins, and which the tokenizer adds to the text."""
    tokens = tokenizer(
        content,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        return_offsets_mapping=by_offset,
    )
    added = tokens.special_tokens_mask
    if by_offset:
        starts = [start for start, _ in tokens.offset_mapping]
    else:
        starts = list(accumulate(1 - mark for mark in added))
    return tokens.input_ids, starts, added
