"""Compare two models whose tokenizers differ: by the bits that each byte of a text takes."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.texts import Scorer
from sleb_cli.engine.quality.token_scores import score_tokens
from sleb_cli.engine.statistics import ratio_difference
from sleb_cli.engine.text.windows import EvaluationWindows, cut_for_evaluation
from sleb_cli.results import BytesResult
from sleb_cli.texts.source import Text
from sleb_plugins import UsageError

STRETCH = 4_096
"""A text without documents is cut into stretches of this many characters, each one observation."""


@dataclass(frozen=True)
class ByteWindows:
    """A text in the tokens of one model, with the bytes of each predicted token, as of `counted`.

    `windows.clusters` numbers documents or stretches of the text, alike for all tokenizers.
    """

    windows: EvaluationWindows
    bytes: Tensor
    stretch: int | None


def cut_by_bytes(tokenizer: Any, text: Text, length: int, *, most: int | None) -> ByteWindows:
    """Cut a text into windows of a model's tokens.

    Raises:
        UsageError: the text is conversations, or the tokenizer does not tell where tokens are.
        DataError: the text is too short.
    """
    if text.conversations or not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"The tokenizers differ, so {text.source} cannot be compared token by token.",
            hint="Compare running text, or leave it out and compare tasks.",
        )
    stretch = None
    if len(text.documents) < 2:
        stretch = STRETCH
        text = replace(text, documents=tuple(range(0, len(text.content), STRETCH)))
    windows = cut_for_evaluation(tokenizer, text, length, most=most)
    tokens = tokenizer(text.content, return_offsets_mapping=True)
    # A token ends where the next begins: pieces of one character count it once.
    starts = [start for start, _ in tokens.offset_mapping] + [len(text.content)]
    sizes = []
    for start, end in pairwise(starts[: windows.ids.numel() + 1]):
        sizes.append(len(text.content[start:end].encode()))
    by_token = torch.tensor(sizes).view(windows.ids.shape)
    return ByteWindows(windows, by_token[:, 1:], stretch)


def measure_bytes(
    dense: ByteWindows, other: ByteWindows, models: Models, batch_size: int | None
) -> BytesResult:
    """Measure both models of a comparison on a text, each in its own tokens."""
    bits = []
    sizes = []
    for read, of_model in ((dense, models), (other, models.alone())):
        losses = _losses(read, of_model, batch_size)
        bits.append(_sum_by_cluster(losses / math.log(2), read))
        sizes.append(_sum_by_cluster(read.bytes.double(), read))
    # The last one may not be whole: windows of the two tokenizers end at other places.
    whole = min(map(len, sizes))
    if whole > 1:
        whole -= 1
    bits = [of_model[:whole] for of_model in bits]
    sizes = [of_model[:whole] for of_model in sizes]
    change = ratio_difference((bits[0], sizes[0]), (bits[1], sizes[1]))
    before, after = (
        float(total.sum() / size.sum()) for total, size in zip(bits, sizes, strict=True)
    )
    text = dense.windows.text
    return BytesResult(
        text=text.source,
        sequence_length=dense.windows.ids.shape[1],
        tokens=(dense.bytes.numel(), other.bytes.numel()),
        bytes=int(sizes[0].sum()),
        clusters=whole,
        stretch=dense.stretch,
        bits=(before, after),
        difference=change.mean,
        standard_error=change.standard_error,
        interval=change.interval,
    )


def _losses(read: ByteWindows, models: Models, batch_size: int | None) -> Tensor:
    windows = read.windows
    with ExitStack() as opened:
        scorer = Scorer(models, [()], windows.ids, batch_size, opened, score_tokens)
        name = models.architecture.source.name
        (scores,) = scorer.score_all(f"{name} on {windows.text.source}", "windows")
    return scores["nll"].double()


def _sum_by_cluster(values: Tensor, read: ByteWindows) -> Tensor:
    clusters = read.windows.clusters
    sums = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64)
    return sums.index_add(0, clusters.flatten(), values.flatten())
