"""Whether decoding with the KV cache gives the logits of passes over the whole text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.model.generation import generate
from sleb_plugins import UnsupportedModelError

CACHE_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The largest difference of logits with the KV cache, whose shapes and so rounding differ, relative to the largest."""

_Refused = partial(UnsupportedModelError, hint="")


def check_decoding(model: Any, ids: Tensor, new_tokens: int, dtype: torch.dtype) -> tuple[float | None, str | None]:
    """Generate with and without the KV cache, after `ids`, [1, positions].

    Both runs use `generate`, because some families count positions differently in a plain forward pass.

    Returns:
        how far logits of steps differ up to the first different token, None if it does not generate; and a clause on
        the fault, or None.
    """
    try:
        cached = _generate(model, ids, new_tokens, "with the KV cache", use_cache=True)
        whole = _generate(model, ids, new_tokens, "without a KV cache", use_cache=False)
    except UnsupportedModelError as error:
        return None, error.message
    # After a tie that was broken differently, the two runs continue different texts.
    alike = int((cached.argmax(-1) == whole.argmax(-1)).cumprod(0).sum())
    difference = relative_difference(cached[: alike + 1], whole[: alike + 1])
    fault = f"with the KV cache its logits differ by {difference:.2g} of the largest from those without"
    return difference, None if difference <= CACHE_TOLERANCES.get(dtype, 0.0) else fault


def _generate(model: Any, ids: Tensor, new_tokens: int, how: str, *, use_cache: bool) -> Tensor:
    settings = GenerationConfig(
        do_sample=False, use_cache=use_cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    generated = generate(model, ids, settings, lambda words: _Refused(f"it does not generate {how}: {words}"))
    if len(generated.logits) != new_tokens:
        raise _Refused(f"it generated {len(generated.logits)} tokens {how}, not {new_tokens}")
    return torch.cat(generated.logits)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected logit; NaN, which fails every check, for NaN logits."""
    if found.shape != expected.shape:
        return float("nan")
    scale = expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / scale)
