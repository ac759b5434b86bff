"""Texts for models that read: each is one sequence, cut where the model stops reading."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.padded import PaddedTexts
from sleb_cli.texts.source import Text
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

MAX_CHARACTERS = 700
"""Running text is cut between sentences into passages of at most this length, if it can be."""
MIN_CHARACTERS = 60
"""Shorter passages are headings and remains."""

SORTED_TOGETHER = 128
"""Texts are sorted by length in runs of this many, so that batches have little padding, and yet no
batch is like the whole.
"""

Item = str | tuple[str, str]
"""A text, or a pair of a query and a text."""


@dataclass(frozen=True)
class TextShape:
    """How a text becomes a sequence: the length where it is cut, what it begins with, and case."""

    length: int
    prompt: str = ""
    lower_case: bool = False


def shape_of(architecture: Architecture, length: int, prompt: str | None) -> TextShape | None:
    """Choose how texts become sequences of a model that reads; None of a language model.

    Raises:
        UsageError: the model has no prompt of this name.
    """
    reading = architecture.reading
    if reading is None:
        if prompt is not None:
            raise UsageError(
                f"--prompt is for embedding models; {architecture.source.id} is a language model.",
                hint="Leave out --prompt.",
            )
        return None
    name = prompt or reading.prompt
    if name is None:
        return TextShape(length, "", reading.lower_case)
    if name not in reading.prompts:
        hint = f"{architecture.source.id} has no prompts: leave out --prompt."
        if reading.prompts:
            hint = did_you_mean(name, sorted(reading.prompts))
        raise UsageError(f"There is no prompt {name!r}.", hint=hint)
    return TextShape(length, reading.prompts[name], reading.lower_case)


def items_of(text: Text) -> list[Item]:
    """Return the texts of a file whose lines are texts or pairs; else passages of running text."""
    if not text.rows:
        return list[Item](passages(text.content))
    items: list[Item] = []
    for row in text.rows:
        if row.query is None:
            items.append(row.text)
        else:
            items.append((row.query, row.text))
    return items


def passages(content: str) -> list[str]:
    """Cut running text between sentences into passages."""
    cut = []
    for paragraph in content.split("\n"):
        current = ""
        for sentence in re.split(r"(?<=[.!?]) +", paragraph.strip()):
            if current and len(current) + len(sentence) > MAX_CHARACTERS:
                cut.append(current)
                current = ""
            current = f"{current} {sentence}".strip()
        cut.append(current)
    return [passage for passage in cut if len(passage) >= MIN_CHARACTERS]


def pad_texts(tokenizer: Any, items: Sequence[Item], shape: TextShape) -> PaddedTexts:
    """Tokenize texts, cut them, and pad them to the length of the shape, on the tokenizer's side.

    Returns:
        a row for each text, [texts, length].
    """
    length = min(shape.length, tokenizer.model_max_length)
    ids = torch.zeros(len(items), length, dtype=torch.int64)
    ids += tokenizer.pad_token_id or 0
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for row, item in enumerate(items):
        encoded = _encode(tokenizer, item, shape, length)
        count = len(encoded["input_ids"])
        begin = 0
        if tokenizer.padding_side == "left":
            begin = length - count
        where = slice(begin, begin + count)
        ids[row, where] = torch.tensor(encoded["input_ids"])
        mask[row, where] = 1
        types[row, where] = torch.tensor(encoded.get("token_type_ids", [0] * count))
    return PaddedTexts(
        ids, mask, types if "token_type_ids" in tokenizer.model_input_names else None
    )


def _encode(tokenizer: Any, item: Item, shape: TextShape, length: int) -> Any:
    parts = [item] if isinstance(item, str) else list(item)
    parts[0] = shape.prompt + parts[0]
    if shape.lower_case:
        parts = [part.lower() for part in parts]
    return tokenizer(*parts, truncation=True, max_length=length)


def sort_in_runs(texts: PaddedTexts, seed: int) -> list[int]:
    """Return an order by chance, but by length in each run of `SORTED_TOGETHER` texts."""
    count = len(texts)
    drawn = random.Random(seed).sample(range(count), count)
    lengths: Tensor = texts.mask.sum(1)
    order = []
    for start in range(0, count, SORTED_TOGETHER):
        run = drawn[start : start + SORTED_TOGETHER]
        order += sorted(run, key=lambda row: int(lengths[row]))
    return order
