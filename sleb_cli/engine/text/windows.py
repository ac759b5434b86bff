"""Cut text into sequences of tokens of equal length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.text.sources import Text
from sleb_cli.requests import DEFAULT_LENGTH
from sleb_cli.results import Bos, ClusteredBy
from sleb_plugins import DataError, UsageError

# A tokenizer may drop a space, or the rest of a character, at the start of what it decodes.
CONTEXT_TOKENS = 8


def choose_length(
    asked: int | None, architecture: Architecture, default: int = DEFAULT_LENGTH, option: str = "--sequence-length"
) -> int:
    """Return the sequence length, at most the model's number of positions; `option` is the user's option for it.

    Raises:
        UsageError: `asked` exceeds the model's positions.
    """
    limit = architecture.longest_sequence
    if asked is None:
        return min(default, limit) if limit else default
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


def begin_with_bos(tokenizer: Any, sequences: Tensor) -> bool:
    """Whether all of these sequences, [sequences, length], begin with the BOS token."""
    return tokenizer.bos_token_id is not None and bool((sequences[:, 0] == tokenizer.bos_token_id).all())


def cut_windows(tokenizer: Any, text: str, length: int, *, bos: bool) -> Tensor:
    """Cut `text` into consecutive windows, int64 [windows, length], and drop an incomplete last one.

    With `bos`, every window starts with the BOS token.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return _rows(ids, length - 1, [tokenizer.bos_token_id]) if bos else _rows(ids, length, [])


def cut_running_text(tokenizer: Any, text: str, length: int) -> Tensor:
    """Cut `text` as the literature does: tokenized as a whole, with a BOS at its start if the tokenizer adds one."""
    return _rows(tokenizer(text).input_ids, length, [])


@dataclass(frozen=True)
class EvaluationWindows:
    """A text to measure perplexity on, cut into windows whose tokens are predicted, each once.

    Attributes:
        text: the text.
        ids: the tokens, int64 [windows, positions].
        counted: which predictions count, bool [windows, positions - 1]: of the tokens after the first.
        clusters: which document, or else which window, each predicted token belongs to; int64, of the same shape.
        clustered_by: what the clusters are.
        bos: what begins with the BOS token.
        stride: how many tokens further each window begins; None if windows do not overlap.
        words: how many words begin in the counted tokens.
        bytes: how many bytes of UTF-8 the counted tokens stand for.
    """

    text: Text
    ids: Tensor
    counted: Tensor
    clusters: Tensor
    clustered_by: ClusteredBy
    bos: Bos
    stride: int | None
    words: int
    bytes: int


def cut_for_evaluation(
    tokenizer: Any, text: Text, length: int, *, bos: bool = False, stride: int | None = None, most: int | None = None
) -> EvaluationWindows:
    """Cut a text into windows as the literature does, one after another, or with a `stride` so that they overlap.

    Overlapping windows count only the tokens that no earlier window had, so each is predicted after at least
    `length - stride` others (Press et al., arXiv 2012.15832, section 2, "sliding window").

    Raises:
        DataError: the text is too short.
        UsageError: the tokenizer has no BOS token, or the stride does not fit the windows.
    """
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("--bos needs a BOS token, but the tokenizer has none.", hint="Leave out --bos.")
    own = length - bos
    if stride is not None and not 1 <= stride <= own:
        raise UsageError(f"--stride {stride} does not fit windows of {own} tokens.", hint=f"Use 1 to {own}.")
    ids, offsets = _tokens(tokenizer, text, special=not bos)
    step = stride or own
    most_tokens = text.limit * own if text.limit else len(ids)
    stream = torch.tensor(ids[:most_tokens], dtype=torch.int64)
    starts = torch.tensor(range(0, len(stream) - own + 1, step)[:most], dtype=torch.int64)
    places = starts.unsqueeze(1) + torch.arange(own)
    rows = require_windows(stream[places], text, tokenizer, length)
    counted = torch.ones(rows.shape, dtype=torch.bool)
    counted[1:, : own - step] = False
    # The first token is predicted only after a BOS.
    first = 0 if bos else 1
    counted[:, :first] = False
    clusters = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
    by_document = False
    if text.documents and offsets is not None:
        documents = _documents(text, offsets)[places]
        by_document = len(set(documents[counted].tolist())) > 1
        clusters = documents if by_document else clusters
    predicted = torch.zeros(len(stream), dtype=torch.bool)
    predicted[places[counted]] = True
    words, size = (
        count_decoded(tokenizer, stream, predicted)
        if offsets is None
        else _count(text.content, offsets[: len(stream), 1], predicted)
    )
    start = torch.full((len(rows), int(bos)), tokenizer.bos_token_id if bos else 0)
    return EvaluationWindows(
        text=text,
        ids=torch.cat([start, rows], dim=1),
        counted=counted[:, first:],
        clusters=clusters[:, first:],
        clustered_by="documents" if by_document else "windows",
        bos="windows" if bos else "text" if adds_bos(tokenizer) else "none",
        stride=stride,
        words=words,
        bytes=size,
    )


def _tokens(tokenizer: Any, text: Text, *, special: bool) -> tuple[list[int], Tensor | None]:
    """Tokenize a text as a whole; return the tokens, and where each begins and ends in it, if the tokenizer says.

    A token that stands for no text, such as a BOS, begins and ends where the one before it ends.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text.content, add_special_tokens=special).input_ids, None
    found = tokenizer(text.content, add_special_tokens=special, return_offsets_mapping=True)
    offsets = torch.tensor(found.offset_mapping, dtype=torch.int64).reshape(-1, 2)
    return found.input_ids, offsets.cummax(0).values


def _documents(text: Text, offsets: Tensor) -> Tensor:
    """Return which document each token is from."""
    starts = offsets[:, 0].contiguous()
    return (torch.searchsorted(torch.tensor(text.documents), starts, right=True) - 1).clamp(min=0)


def _count(content: str, ends: Tensor, counted: Tensor) -> tuple[int, int]:
    """Return how many words begin in the counted tokens, and how many bytes of UTF-8 they stand for.

    A token stands for the characters from the end of the token before it, so each belongs to one token.
    """
    characters = np.frombuffer(content.encode("utf-32-le"), dtype="<u4")
    spaces = np.isin(characters, [point for point in np.unique(characters) if chr(point).isspace()])
    begins = ~spaces & np.concatenate([[True], spaces])[:-1]
    widths = 1 + np.digitize(characters, [0x80, 0x800, 0x10000])
    of_counted = np.repeat(counted.numpy(), np.diff(ends.numpy(), prepend=0))
    read = slice(len(of_counted))
    return int(begins[read][of_counted].sum()), int(widths[read][of_counted].sum())


def count_decoded(tokenizer: Any, ids: Tensor, counted: Tensor) -> tuple[int, int]:
    """Count words and bytes by what a tokenizer without offsets makes of the tokens.

    Each run of counted tokens is decoded after some of those before it, so that it begins in the middle of a text.
    """
    edges = torch.diff(
        counted.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32)
    )
    words = size = 0
    for first, last in zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True):
        begin = max(0, first - CONTEXT_TOKENS)
        before, whole = (_decoded(tokenizer, ids[begin:end].tolist()) for end in (first, last))
        words += len(whole.split()) - len(before.split())
        size += len(whole.encode()) - len(before.encode())
    return words, size


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens; a character of which some bytes are missing at the end belongs to the next token."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


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
    """Check that a source has text for the sequences asked for.

    Raises:
        DataError: it has less.
    """
    if asked is not None and found < asked:
        raise DataError(
            f"{source} has text for {found} sequences of {length} tokens, not for {asked}.",
            hint=f"Take {found} or fewer from it, use more text, or reduce --sequence-length.",
        )


def whole_mask(sequences: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Return which tokens count, bool in the shape of the sequences: all, if there is no loss mask."""
    return torch.ones_like(sequences, dtype=torch.bool) if loss_mask is None else loss_mask


def tokens_sha256(windows: Tensor) -> str:
    """Return the SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(windows.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
