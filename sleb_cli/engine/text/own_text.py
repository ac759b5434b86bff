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

OWN_TEXT_TASK = "Generating calibration text"


def generate_own_text(
    model: Any, tokenizer: Any, settings: CalibrationSettings, notify: Notify
) -> Tensor:
    """Let the model generate the sequences, sampled after BOS, or find them in the cache.

    Raises:
        ModelError: the tokenizer has no token to start with.
        UnsupportedModelError: the model cannot generate text.
    """
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        raise ModelError(
            "The tokenizer has neither a BOS nor an EOS token, so the model cannot start a text.",
            hint=GIVE_TEXT,
        )
    begin = [start] if adds_bos(tokenizer) else []  # as in every text of this tokenizer
    count = settings.samples
    new = settings.sequence_length - len(begin)
    forbidden = sorted({tokenizer.eos_token_id} - {None})  # every sequence is one text

    def write(more: Continue, size: int) -> list[list[int]]:
        rows = list[list[int]]()
        while len(rows) < count:
            prompts = [[start]] * min(size, count - len(rows))
            rows += more(prompts, new, forbidden)
        return [begin + row for row in rows]

    writing = Writing(
        title=OWN_TEXT_TASK,
        noun="sequence",
        count=count,
        new=new,
        seed=settings.seed,
        model=settings.writer,
        key={"start": start, "bos": bool(begin), "forbidden": forbidden},
    )
    return torch.tensor(write_or_find(model, writing, write, notify))
