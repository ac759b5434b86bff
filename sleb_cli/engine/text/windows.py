"""Cut text into the equally long sequences of tokens that a model reads."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.text.sources import Text
from sleb_plugins import DataError, UsageError

DEFAULT_LENGTH = 2048


def choose_length(
    asked: int | None, architecture: Architecture, default: int = DEFAULT_LENGTH, option: str = "--sequence-length"
) -> int:
    """Give the sequence length, at most what the model's positions allow; `option` is what the user fills it with.

    Raises:
        UsageError: `asked` is longer than the model's positions, or too short to predict anything.
    """
    limit = architecture.longest_sequence
    if asked is None:
        return min(default, limit) if limit else default
    if asked < 2:
        raise UsageError(f"A sequence of {asked} tokens predicts nothing.", hint="Take at least 2.")
    if limit and asked > limit:
        raise UsageError(
            f"Sequences of {asked} tokens are longer than the {limit} positions of {architecture.source.id}.",
            hint=f"Take {option} {limit} or less.",
        )
    return asked


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS token by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def cut_windows(tokenizer: Any, text: str, length: int, *, bos: bool) -> Tensor:
    """Cut `text` into consecutive windows, int64 [windows, length]; the tail that does not fill one is dropped.

    With `bos`, every window starts with the BOS token; else tokens stand as the text has them.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return _rows(ids, length - 1, [tokenizer.bos_token_id]) if bos else _rows(ids, length, [])


def cut_running_text(tokenizer: Any, text: str, length: int) -> Tensor:
    """Cut `text`, tokenized as one (with a BOS at its start where the tokenizer adds one), as the literature does."""
    return _rows(tokenizer(text).input_ids, length, [])


def _rows(ids: list[int], length: int, start: list[int]) -> Tensor:
    count = len(ids) // length
    rows = [start + ids[row * length : (row + 1) * length] for row in range(count)]
    return torch.tensor(rows, dtype=torch.int64).reshape(count, length + len(start))


def require_windows(windows: Tensor, text: Text, tokenizer: Any, length: int, asked: int | None = None) -> Tensor:
    """Give the windows back, or refuse a text that is too short and say how much there is.

    Raises:
        DataError: there is no whole window, or fewer than asked for.
    """
    found = windows.shape[0]
    if found == 0:
        tokens = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise DataError(
            f"{text.source} has {tokens} tokens, less than one sequence of {length}.",
            hint="Use more text, or a shorter --sequence-length.",
        )
    require_enough(found, text.source, length, asked)
    return windows


def require_enough(found: int, source: str, length: int, asked: int | None) -> None:
    """Refuse a source that gives fewer sequences than asked for.

    Raises:
        DataError: it does.
    """
    if asked is not None and found < asked:
        raise DataError(
            f"{source} has text for {found} sequences of {length} tokens, not for {asked}.",
            hint=f"Ask for {found} of it or fewer, use more text, or a shorter --sequence-length.",
        )


def tokens_sha256(windows: Tensor) -> str:
    """Give the SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(windows.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
