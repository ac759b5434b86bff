"""Compare two models whose tokenizers differ: by the bits that each byte of a text takes."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.texts import WINDOWS, Scorer
from sleb_cli.engine.quality.token_scores import score_tokens
from sleb_cli.engine.statistics import ratio_difference
from sleb_cli.engine.text.windows import EvaluationWindows, cut_for_evaluation
from sleb_cli.results import BytesResult
from sleb_cli.texts.source import Text
from sleb_plugins import UsageError

STRETCH = 1_024
"""A text without documents is cut into stretches of this many characters, each one observation."""


@dataclass(frozen=True)
class ByteWindows:
    """A text in the tokens of one model.

    Attributes:
        starts: where each predicted token begins in the text, int64 [windows, positions - 1].
        bytes: how many bytes of the text it has, of this shape.
        end: where the last window ends in the text.
    """

    windows: EvaluationWindows
    starts: Tensor
    bytes: Tensor
    end: int


def cut_by_bytes(
    tokenizer: Any, text: Text, length: int, *, bos: bool, most: int | None
) -> ByteWindows:
    """Cut a text into windows of a model's tokens; with `bos`, each begins with the BOS token.

    Raises:
        UsageError: the text is conversations, or the tokenizer does not tell where tokens are.
        DataError: the text is too short.
    """
    if text.conversations or not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"The tokenizers differ, so {text.source} cannot be compared token by token.",
            hint="Compare running text, or leave it out and compare tasks.",
        )
    windows = cut_for_evaluation(tokenizer, text, length, bos=bos, most=most)
    width = length - 1 if bos else length
    count = len(windows.ids) * width
    tokens = tokenizer(text.content, add_special_tokens=not bos, return_offsets_mapping=True)
    # A token ends where the next begins: pieces of one character count it once.
    starts = [len(text.content)]
    for start, end in reversed(tokens.offset_mapping):
        # One without text, such as an EOS that ends the text, begins there, too.
        starts.append(start if start < end else starts[-1])
    starts.reverse()
    sizes = []
    for start, end in pairwise(starts[: count + 1]):
        sizes.append(len(text.content[start:end].encode()))
    return ByteWindows(
        windows,
        starts=torch.tensor(starts[:count]).view(-1, width)[:, 1 - length :],
        bytes=torch.tensor(sizes).view(-1, width)[:, 1 - length :],
        end=starts[count],
    )


def measure_bytes(
    dense: ByteWindows, other: ByteWindows, models: Models, batch_size: int | None
) -> BytesResult:
    """Measure both models of a comparison on a text, each in its own tokens."""
    text = dense.windows.text
    # Windows of the two tokenizers end at other places.
    end = min(dense.end, other.end)
    stretch = None
    documents = [start for start in text.documents if start < end]
    if len(documents) < 2:
        stretch = STRETCH
        documents = list(range(0, end, STRETCH))
    bits = []
    sizes = []
    tokens = []
    for read, of_model in ((dense, models), (other, models.alone())):
        counted = read.starts < end
        cluster = torch.searchsorted(torch.tensor(documents), read.starts[counted], right=True) - 1
        sums = torch.zeros(len(documents), dtype=torch.float64)
        losses = _losses(read, of_model, batch_size)[counted]
        bits.append(sums.index_add(0, cluster, losses / math.log(2)))
        sizes.append(sums.index_add(0, cluster, read.bytes[counted].double()))
        tokens.append(int(counted.sum()))
    change = ratio_difference((bits[0], sizes[0]), (bits[1], sizes[1]))
    before = float(bits[0].sum() / sizes[0].sum())
    return BytesResult(
        text=text.source,
        sequence_length=dense.windows.ids.shape[1],
        tokens=(tokens[0], tokens[1]),
        bytes=int(sizes[0].sum()),
        clusters=len(documents),
        stretch=stretch,
        bits=(before, before + change.mean),
        difference=change.mean,
        standard_error=change.standard_error,
        interval=change.interval,
    )


def _losses(read: ByteWindows, models: Models, batch_size: int | None) -> Tensor:
    windows = read.windows
    with ExitStack() as opened:
        scorer = Scorer(models, [()], windows.ids, batch_size, opened, score_tokens)
        name = models.architecture.source.name
        (scores,) = scorer.score_all(f"{name} on {windows.text.source}", WINDOWS)
    return scores["nll"].double()
