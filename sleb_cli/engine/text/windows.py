"""Cut text into sequences of tokens of equal length."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.text.sources import Text
from sleb_cli.requests import DEFAULT_LENGTH
from sleb_plugins import DataError, UsageError


def choose_length(
    asked: int | None, architecture: Architecture, default: int = DEFAULT_LENGTH, option: str = "--sequence-length"
) -> int:
    """Return the sequence length, at most the model's number of positions; `option` is the user's option for it.

    Raises:
        UsageError: `asked` exceeds the model's positions, or is too short to predict a token.
    """
    limit = architecture.longest_sequence
    if asked is None:
        return min(default, limit) if limit else default
    if asked < 2:
        raise UsageError(f"{option} {asked} is too short to predict a token.", hint="Use 2 or more.")
    if limit and asked > limit:
        raise UsageError(
            f"{option} {asked} exceeds the {limit} positions of {architecture.source.id}.",
            hint=f"Use {option} {limit} or less.",
        )
    return asked


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds its BOS token to the start of every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def cut_windows(tokenizer: Any, text: str, length: int, *, bos: bool) -> Tensor:
    """Cut `text` into consecutive windows, int64 [windows, length], and drop an incomplete last one.

    With `bos`, every window starts with the BOS token.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return _rows(ids, length - 1, [tokenizer.bos_token_id]) if bos else _rows(ids, length, [])


def cut_running_text(tokenizer: Any, text: str, length: int) -> Tensor:
    """Cut `text` as the literature does: tokenized as a whole, with a BOS at its start if the tokenizer adds one."""
    return _rows(tokenizer(text).input_ids, length, [])


def _rows(ids: list[int], length: int, start: list[int]) -> Tensor:
    count = len(ids) // length
    rows = [start + ids[row * length : (row + 1) * length] for row in range(count)]
    return torch.tensor(rows, dtype=torch.int64).reshape(count, length + len(start))


def require_windows(windows: Tensor, text: Text, tokenizer: Any, length: int, asked: int | None = None) -> Tensor:
    """Return the windows, or refuse a text that is too short.

    Raises:
        DataError: there are no windows, or fewer than asked for.
    """
    found = windows.shape[0]
    if found == 0:
        tokens = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise DataError(
            f"{text.source} has {tokens} tokens, less than one sequence of {length}.",
            hint="Use more text, or reduce --sequence-length.",
        )
    require_enough(found, text.source, length, asked)
    return windows


def require_enough(found: int, source: str, length: int, asked: int | None) -> None:
    """Refuse a source with text for fewer sequences than asked for.

    Raises:
        DataError: it does.
    """
    if asked is not None and found < asked:
        raise DataError(
            f"{source} has text for {found} sequences of {length} tokens, not for {asked}.",
            hint=f"Take {found} or fewer from it, use more text, or reduce --sequence-length.",
        )


def tokens_sha256(windows: Tensor) -> str:
    """Return the SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(windows.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
