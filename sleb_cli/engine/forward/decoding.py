"""Check that decoding with the KV cache gives the logits of passes over the whole text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.model.generation import generate
from sleb_plugins import UnsupportedModelError

CACHE_TOLERANCES = {
    torch.float32: 1e-4,
    torch.float64: 1e-8,
    torch.bfloat16: 2.0**-4,
    torch.float16: 2.0**-7,
}
"""Relative difference of logits to allow with the KV cache, whose shapes and so rounding differ."""

_Refused = partial(UnsupportedModelError, hint="")


def check_decoding(
    model: Any, ids: Tensor, new_tokens: int, dtype: torch.dtype
) -> tuple[float | None, str | None]:
    """Generate with and without the KV cache, after `ids`, [1, positions].

    Returns:
        the relative difference of logits up to the first different token, None if the model does
        not generate; and a clause on the fault, if any.
    """
    # Both with `generate`: some families count positions differently in a plain forward pass.
    try:
        cached = _generate(model, ids, new_tokens, "with the KV cache", use_cache=True)
        uncached = _generate(model, ids, new_tokens, "without a KV cache", use_cache=False)
    except UnsupportedModelError as error:
        return None, error.message
    # After a tie that was broken differently, the two runs continue different texts.
    common = int((cached.argmax(-1) == uncached.argmax(-1)).cumprod(0).sum())
    difference = relative_difference(cached[: common + 1], uncached[: common + 1])
    if difference <= CACHE_TOLERANCES.get(dtype, 0.0):
        return difference, None
    return difference, (
        f"with the KV cache its logits differ by {difference:.2g} of the largest from those without"
    )


def _generate(model: Any, ids: Tensor, new_tokens: int, how: str, *, use_cache: bool) -> Tensor:
    settings = GenerationConfig(
        do_sample=False, use_cache=use_cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    generated = generate(
        model, ids, settings, lambda words: _Refused(f"it does not generate {how}: {words}")
    )
    if len(generated.logits) != new_tokens:
        raise _Refused(f"it generated {len(generated.logits)} tokens {how}, not {new_tokens}")
    return torch.cat(generated.logits)


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected logit.

    It is NaN for NaN logits or other shapes.
    """
    if logits.shape != expected.shape:
        return float("nan")
    scale = expected.float().abs().max()
    return float((logits.float() - expected.float()).abs().max() / scale)
