"""Generate text with settings of our own, and none of the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import SlebError


def generate(
    model: Any, prompt: Tensor, settings: GenerationConfig, refused: Callable[[str], SlebError], **options: Any
) -> Any:
    """Return what transformers generates after `prompt`, [batch, positions], with exactly these settings.

    transformers fills unset ones from the model's `generation_config.json`: a repetition penalty or a `top_p` there
    would change the distribution that is sampled, and another end token the number of steps that are timed.

    Raises:
        SlebError: the one that `refused` makes of transformers' message.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with translate_errors(refused):
            options = {"attention_mask": torch.ones_like(prompt)} | options
            return model.generate(prompt, generation_config=settings, **options)
    finally:
        model.generation_config = own


@contextmanager
def as_transformers_loads(models: Iterable[Any]) -> Iterator[None]:
    """Let weights require gradients, which ours do not, although none are computed.

    torch folds a product into one of matrices only then. Otherwise a head in bfloat16 that reads one position takes
    thirty times as long on a CPU, which nobody sees who loads the model with transformers.
    """
    plain = [model for model in models if getattr(model, "hf_quantizer", None) is None]
    frozen = {weight for model in plain for weight in model.parameters() if not weight.requires_grad}
    changed = [weight.requires_grad_(True) for weight in frozen if weight.is_floating_point()]
    try:
        yield
    finally:
        for weight in changed:
            weight.requires_grad_(False)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    found = getattr(model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [found]
    return {token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)}
