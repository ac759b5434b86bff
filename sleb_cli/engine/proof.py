"""The proof after save: a pruned checkpoint does what the dense model with its blocks switched off does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.foreign import transformers_reads, verdict
from sleb_cli.engine.gates import GatedModel
from sleb_cli.engine.loading import dtype_name, free_memory, has_tokenizer, load_dense, load_tokenizer, misfit
from sleb_cli.engine.surgery import Surgery
from sleb_cli.events import Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.results import Proof
from sleb_plugins import ModelError, ProofError

PROMPT = (
    "A river begins as snow on a mountain. In spring the water runs down over the rocks, gathers in "
    "streams, and reaches the plain, where people built mills and towns along its banks. They asked "
    "how deep it was, who owned the fish, and why it flooded every ninth year. Nobody could answer "
    "all three questions, so they wrote down what they saw, measured it, and compared their notes."
)
PROMPT_TOKENS = 64
NEW_TOKENS = 8

TOLERANCE = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Largest difference of any logit from the gated dense model, relative to the largest logit."""

CACHE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The same between decoding with the KV cache and without: other shapes, so other rounding."""


@torch.inference_mode()
def prove(surgery: Surgery, folder: Path, dtype: torch.dtype, device: torch.device, notify: Notify) -> Proof:
    """Load the checkpoint in `folder` as anyone would, and compare.

    Raises:
        ProofError: with the check that failed.
    """
    limit = surgery.architecture.longest_sequence or PROMPT_TOKENS + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, max(1, limit // 2))
    prompt, ids = _prompt(surgery, max(1, min(PROMPT_TOKENS, limit - new_tokens)), device)
    expected = _gated_logits(surgery, ids, dtype, device, notify)
    free_memory()
    task = "Proving the checkpoint"
    notify(TaskStarted(task, 3, "checks"))
    model = _load_stock(folder, surgery.architecture, dtype, device)
    notify(TaskAdvanced(task, note="loads"))
    with verdict(lambda words: _failed(f"it does not run: {words}")):
        found = model(input_ids=ids, use_cache=False).logits
    difference = _relative_difference(found, expected)
    if not difference <= TOLERANCE.get(dtype, 0.0):
        raise _failed(
            f"its logits differ from the gated dense model's by {difference:.2g} of the largest, "
            f"where {TOLERANCE.get(dtype, 0.0):.2g} is allowed in {dtype_name(dtype)}"
        )
    notify(TaskAdvanced(task, note="same logits"))
    cache_difference = _decode(model, ids, new_tokens, dtype)
    notify(TaskFinished(task))
    return Proof(
        prompt=prompt,
        prompt_tokens=ids.shape[1],
        new_tokens=new_tokens,
        logits_difference=difference,
        logits_tolerance=TOLERANCE.get(dtype, 0.0),
        cache_difference=cache_difference,
        cache_tolerance=CACHE_TOLERANCE.get(dtype, 0.0),
    )


def _prompt(surgery: Surgery, room: int, device: torch.device) -> tuple[Literal["text", "random tokens"], Tensor]:
    """Give the prompt's kind and tokens, [1, tokens]: real text where the model has a tokenizer."""
    architecture = surgery.architecture
    if has_tokenizer(architecture.source):
        ids = load_tokenizer(architecture.source)(PROMPT).input_ids[:room]
        return "text", torch.tensor([ids], device=device)
    vocabulary = architecture.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    return "random tokens", torch.randint(vocabulary, (1, room), generator=seeded).to(device)


def _gated_logits(surgery: Surgery, ids: Tensor, dtype: torch.dtype, device: torch.device, notify: Notify) -> Tensor:
    dense = load_dense(surgery.architecture, dtype, device, notify)
    _align(dense)
    with GatedModel(dense, surgery.architecture.blocks_of(dense)) as gated:
        return gated.logits(ids, surgery.removed)


def _load_stock(folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Any:
    trusted = architecture.source.trust_remote_code
    try:
        with transformers_reads("it"):
            model, info = architecture.auto_class.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trusted, output_loading_info=True
            )
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    found = misfit(info, "missing", "unexpected", "mismatched")
    if found:
        raise _failed(found)
    _align(model)
    return model.to(device).eval()


def _align(model: Any) -> None:
    """Put every weight at an address that the fast kernels like; elsewhere they may round otherwise."""
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _decode(model: Any, ids: Tensor, new_tokens: int, dtype: torch.dtype) -> float:
    """Generate with the KV cache and without, and compare the logits of each step up to the first other choice.

    Without means by `generate` too: some families count positions otherwise there than in a plain pass.
    """
    runs = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            do_sample=False, use_cache=use_cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        how = "with the KV cache" if use_cache else "without a KV cache"
        with verdict(partial(_not_generating, how)):
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found = generated.sequences.shape[1] - ids.shape[1]
        if found != new_tokens:
            raise _failed(f"it generated {found} tokens {how}, not {new_tokens}")
        runs.append(torch.cat(generated.logits))
    cached, whole = runs
    # After a tie that fell the other way, the two go on from different texts.
    alike = int((cached.argmax(-1) == whole.argmax(-1)).cumprod(0).sum())
    difference = _relative_difference(cached[: alike + 1], whole[: alike + 1])
    if not difference <= CACHE_TOLERANCE.get(dtype, 0.0):
        raise _failed(f"with the KV cache its logits differ by {difference:.2g} of the largest from those without")
    return difference


def _not_generating(how: str, words: str) -> ProofError:
    return _failed(f"it does not generate {how}: {words}")


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the largest expected logit; NaN, which passes no check, for NaN logits."""
    if found.shape != expected.shape:
        return float("nan")
    scale = expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / scale)


def _failed(what: str) -> ProofError:
    return ProofError(
        f"The pruned checkpoint failed its proof: {what}.",
        hint="Nothing was delivered. Report the model to us; --no-verify writes the checkpoint without proof.",
    )
