"""Calibration text that the model writes itself, from nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.windows import adds_bos
from sleb_cli.engine.text.writing import GIVE_TEXT, Continue, Writing, write_or_find
from sleb_cli.events import Notify
from sleb_plugins import ModelError


def generate_own_text(
    model: Any, tokenizer: Any, settings: CalibrationSettings, notify: Notify
) -> Tensor:
    """Let the model generate the sequences, sampled from its own distribution after BOS, or find
    them in the cache.

    Raises:
        ModelError: the tokenizer has no token to start with.
        UnsupportedModelError: the model cannot generate text.
    """
    start = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None
    )
    if start is None:
        raise ModelError(
            "The tokenizer has neither a BOS nor an EOS token, so the model cannot start a text.",
            hint=GIVE_TEXT,
        )
    begin = [start] if adds_bos(tokenizer) else []  # as in every text of this tokenizer
    count, new = settings.samples, settings.sequence_length - len(begin)
    forbidden = sorted({tokenizer.eos_token_id} - {None})  # every sequence is one text

    def write(more: Continue, size: int) -> list[list[int]]:
        batches = (min(size, count - first) for first in range(0, count, size))
        return [begin + row for batch in batches for row in more([[start]] * batch, new, forbidden)]

    key = {"start": start, "bos": bool(begin), "forbidden": forbidden}
    writing = Writing(
        "Generating calibration text", "sequence", count, new, settings.seed, settings.writer, key
    )
    return torch.tensor(write_or_find(model, writing, write, notify))
