"""`sleb search --load-in`: the weights of a plain checkpoint in 8 or 4 bits, by bitsandbytes through transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.events import Notice, Notify
from sleb_plugins import MachineError, UnsupportedModelError

MOST = 0.9
"""A model of which less than this share is packed is reported."""


def require_fewer_bits(architecture: Architecture) -> None:
    """Check that a model's weights can be held in fewer bits here.

    Raises:
        MachineError: bitsandbytes is not installed.
        UnsupportedModelError: they are packed already.
    """
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized already, so --load-in does not apply.", hint="Leave it out."
        )
    if find_spec("bitsandbytes") is None:
        raise MachineError(
            "--load-in needs bitsandbytes, which is not installed.",
            hint="Run `pip install 'sleb[bitsandbytes]'`, or leave out --load-in.",
        )


def fewer_bits(bits: int, dtype: torch.dtype) -> Any:
    """Return the settings by which transformers packs weights as it loads them: LLM.int8() or NF4.

    All linear layers but the head are packed. Products are computed in `dtype`.
    Sources: Dettmers et al., arXiv 2208.07339 (8 bits) and 2305.14314 (4 bits).
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def report_unpacked(blocks: Iterable[nn.Module], notify: Notify) -> None:
    """Tell if much of the blocks was not packed: bitsandbytes packs linear layers, and experts often are none."""
    packed, left = 0, dict[str, int]()
    for block in blocks:
        for name, weight in block.named_parameters():
            if weight.is_floating_point():
                left[name] = left.get(name, 0) + weight.numel()
            else:
                packed += weight.numel() * (2 if weight.dtype is torch.uint8 else 1)  # two weights of 4 bits in a byte
    share = packed / max(1, packed + sum(left.values()))
    if share < MOST:
        largest = max(left, key=lambda name: left[name])
        notify(
            Notice(f"--load-in packs only {share:.0%} of the blocks' weights; {largest} and others stay as they are.")
        )
