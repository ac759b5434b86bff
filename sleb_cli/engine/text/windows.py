"""Cut text into sequences of tokens of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.events import Notice, Notify, ignore
from sleb_cli.requests import DEFAULT_LENGTH
from sleb_cli.results import Bos, ClusteredBy
from sleb_cli.texts.source import Text
from sleb_plugins import DataError, UsageError

R = TypeVar("R")

SHORTEST = 32
"""A sequence has at least this many tokens, unless the user asks for fewer."""
FEWEST = 4
"""Sequences of a text that is too short for one of the default length."""


def choose_length(
    requested: int | None,
    architecture: Architecture,
    default: int = DEFAULT_LENGTH,
    option: str = "--sequence-length",
) -> int:
    """Return the sequence length, by default what the model has positions for.

    Raises:
        UsageError: the `option` asks for more positions than there are.
    """
    limit = architecture.longest_sequence
    if requested is None:
        return min(default, limit) if limit else default
    if limit and requested > limit:
        raise UsageError(
            f"{option} {requested} exceeds the {limit} positions of {architecture.source.id}.",
            hint=f"Use {option} {limit} or less.",
        )
    return requested


class TooShort(DataError):
    """A text has too few tokens for one sequence."""

    has = ""
    """How many tokens it has, in words."""


def too_short(message: str, source: str, tokens: int) -> TooShort:
    """Return an error about a source that has only so many tokens."""
    error = TooShort(message, hint=f"Use more text, or --sequence-length {tokens} or less.")
    error.has = f"{source} has {tokens} tokens"
    return error


def follow_text(
    read: Callable[[int, Notify], R],
    length: int,
    count: Callable[[R], int],
    notify: Notify,
) -> R:
    """Read sequences of `length` tokens, or of half of it, a quarter and so on, if the text is too
    short for one.

    Raises:
        TooShort: of `SHORTEST` tokens, there are fewer than `FEWEST` sequences.
    """
    try:
        return read(length, notify)
    except TooShort as error:
        first_error = error
    shorter = length // 2
    while shorter >= SHORTEST:
        try:
            sequences = read(shorter, ignore)
        except DataError:  # there are too few
            shorter //= 2
            continue
        if count(sequences) >= FEWEST:
            notify(Notice(f"{first_error.has}, so sequences have {shorter}, not {length}."))
            return sequences
        shorter //= 2
    raise first_error


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts every text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def begin_with_bos(tokenizer: Any, sequences: Tensor) -> bool:
    """Whether all of these sequences, [sequences, length], begin with the BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and bool((sequences[:, 0] == bos).all())


def cut_windows(tokenizer: Any, text: str, length: int, *, bos: bool) -> Tensor:
    """Cut a text into consecutive windows, int64 [windows, length]; an incomplete last one is lost.

    With `bos`, every window starts with the BOS token.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return _cut(ids, length, [tokenizer.bos_token_id] if bos else [])


def cut_running_text(tokenizer: Any, text: str, length: int) -> Tensor:
    """Cut a text as the literature does.

    It is tokenized as a whole, with the BOS that the tokenizer may add at its start.
    """
    return _cut(tokenizer(text).input_ids, length, [])


@dataclass(frozen=True)
class EvaluationWindows:
    """A text to measure perplexity on, cut into windows whose tokens are predicted, each once.

    Attributes:
        ids: the tokens, int64 [windows, positions].
        counted: marks the predictions that count, bool [windows, positions - 1]: the first token is
            not predicted.
        clusters: the number of each predicted token's document, or else of its window; int64, of
            the same shape.
        bos: whether each window begins with the BOS token, only the text does, or neither.
    """

    text: Text
    ids: Tensor
    counted: Tensor
    clusters: Tensor
    clustered_by: ClusteredBy
    bos: Bos

    def select(self, chosen: Tensor) -> EvaluationWindows:
        """Return the windows that are chosen, bool [windows]."""
        return replace(
            self,
            ids=self.ids[chosen],
            counted=self.counted[chosen],
            clusters=self.clusters[chosen],
        )


def cut_for_evaluation(
    tokenizer: Any, text: Text, length: int, *, bos: bool = False, most: int | None = None
) -> EvaluationWindows:
    """Cut a text into windows, one after another, as the literature does.

    Raises:
        DataError: the text is too short.
        UsageError: the tokenizer has no BOS token.
    """
    if bos and tokenizer.bos_token_id is None:
        raise UsageError(
            "--bos needs a BOS token, but the tokenizer has none.", hint="Leave out --bos."
        )
    # Only fast tokenizers tell where tokens are.
    by_document = bool(text.documents) and getattr(tokenizer, "is_fast", False)
    tokens = tokenizer(text.content, add_special_tokens=not bos, return_offsets_mapping=by_document)
    windows = _cut(tokens.input_ids, length, [tokenizer.bos_token_id] if bos else [])
    windows = windows[:most][: text.limit]
    ids = require_windows(windows, text, tokenizer, length)
    clusters = torch.arange(len(ids)).unsqueeze(1).expand(-1, length - 1)
    if by_document:
        width = length - 1 if bos else length
        documents = _document_numbers(text, tokens.offset_mapping)[: len(ids) * width]
        documents = documents.view(-1, width)[:, 1 - length :]
        by_document = bool((documents != documents[0, 0]).any())
        if by_document:
            clusters = documents
    begins: Bos = "text" if adds_bos(tokenizer) else "none"
    return EvaluationWindows(
        text=text,
        ids=ids,
        counted=torch.ones_like(clusters, dtype=torch.bool),
        clusters=clusters,
        clustered_by="documents" if by_document else "windows",
        bos="windows" if bos else begins,
    )


def _document_numbers(text: Text, offsets: list[tuple[int, int]]) -> Tensor:
    # A token without text, such as a BOS, belongs to the document before.
    starts = torch.tensor(offsets, dtype=torch.int64)[:, 0].cummax(0).values
    return (torch.searchsorted(torch.tensor(text.documents), starts, right=True) - 1).clamp(min=0)


def _cut(ids: list[int], length: int, start: list[int]) -> Tensor:
    # Each window has `length` tokens, the first ones of which are `start`.
    width = length - len(start)
    count = len(ids) // width
    windows = torch.tensor(ids[: count * width], dtype=torch.int64).view(count, width)
    first = torch.tensor(start, dtype=torch.int64).expand(count, -1)
    return torch.cat([first, windows], 1)


def require_windows(
    windows: Tensor, text: Text, tokenizer: Any, length: int, required: int | None = None
) -> Tensor:
    """Return the windows; raise a DataError if there are none, or fewer than required."""
    if not len(windows):
        tokens = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise too_short(
            f"{text.source} has {tokens} tokens, less than one sequence of {length}.",
            text.source,
            tokens,
        )
    require_enough(len(windows), text.source, length, required)
    return windows


def require_enough(count: int, source: str, length: int, required: int | None) -> None:
    """Raise a DataError if a source has text for `count` sequences, but more are required."""
    if required is not None and count < required:
        raise DataError(
            f"{source} has text for {count} sequences of {length} tokens, not for {required}.",
            hint=f"Take {count} or fewer from it, use more text, or reduce --sequence-length.",
        )


def whole_mask(sequences: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Return the loss mask, bool in the shape of the sequences; without one, all tokens count."""
    if loss_mask is None:
        return torch.ones_like(sequences, dtype=torch.bool)
    return loss_mask


def tokens_sha256(windows: Tensor) -> str:
    """Return the SHA-256 of the token ids as little-endian int64."""
    ids = windows.cpu().contiguous().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()
