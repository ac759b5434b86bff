"""Generate text with settings of our own, and none of the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import SlebError

MAX_ENDED_SHARE = 0.25
"""Once more of the texts have ended, they leave the batch, and only the others are continued."""


def generate(
    model: Any,
    prompt: Tensor,
    settings: GenerationConfig,
    refused: Callable[[str], SlebError],
    **options: Any,
) -> Any:
    """Generate after `prompt`, [batch, positions], with exactly these settings."""
    # Without an empty config, transformers fills unset settings from the model's
    # `generation_config.json`: a repetition penalty or a `top_p` changes the distribution that is
    # sampled, an end token the number of steps that are timed.
    options = {"attention_mask": torch.ones_like(prompt)} | options
    with (
        mock.patch.object(model, "generation_config", GenerationConfig()),
        translate_errors(refused),
    ):
        return model.generate(prompt, generation_config=settings, **options)


HaveEnded = Callable[[Tensor], Tensor]
"""Called after every step with all new tokens, [batch, tokens]; returns which texts have ended,
bool [batch].
"""


def continue_each(
    run: Callable[..., Any],
    prompts: Tensor,
    attended: Tensor,
    new: int,
    ended: Callable[[int], HaveEnded],
) -> list[Tensor]:
    """Return at most `new` tokens after each prompt; behind a text's end, they are undefined.

    Args:
        run: transformers' `generate`, given a batch of tokens, settings for a `GenerationConfig`,
            and other options.
        prompts: tokens, padded on the left, [batch, positions].
        attended: 1 for each token that is no padding, of the same shape.
        new: the most tokens that follow.
        ended: given the size of a batch, returns the function that says which of its texts have
            ended.
    """
    start, ids, cache = prompts.shape[1], prompts, dict[str, Any]()
    written, rows = [prompts[0, :0]] * len(prompts), [*range(len(prompts))]
    while rows and ids.shape[1] < start + new:
        stop = _ManyEnded(start, ended(len(rows)))
        settings = {
            "max_new_tokens": start + new - ids.shape[1],
            "use_cache": True,
            "return_dict_in_generate": True,
        }
        output = run(
            ids,
            settings,
            attention_mask=attended,
            stopping_criteria=StoppingCriteriaList([stop]),
            **cache,
        )
        for row, tokens in zip(rows, output.sequences[:, start:], strict=True):
            written[row] = tokens
        going_on = (~stop.ended).nonzero()[:, 0].to(ids.device)
        rows = [rows[at] for at in going_on.tolist()]
        ids = output.sequences[going_on]
        attended = torch.nn.functional.pad(
            attended[going_on], (0, ids.shape[1] - attended.shape[1]), value=1
        )
        cache = _cache_option(output, going_on)
    return written


class _ManyEnded(StoppingCriteria):  # type: ignore[misc]
    """Stops when many texts have ended; `ended` marks them, bool [batch]."""

    ended: Tensor

    def __init__(self, start: int, have_ended: HaveEnded) -> None:
        self._start, self._have_ended = start, have_ended

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        self.ended = self._have_ended(input_ids[:, self._start :])
        is_over = int(self.ended.sum()) >= MAX_ENDED_SHARE * len(self.ended)
        return torch.full((len(input_ids),), is_over, device=input_ids.device)


def cache_of(output: Any) -> tuple[str, Any]:
    """Return the KV cache in a model's output, by the name of its option; None without one."""
    # transformers 5.24 calls it `cache`, earlier versions `past_key_values`.
    for name in ("cache", "past_key_values"):
        cache = getattr(output, name, None)
        if cache is not None:
            return name, cache
    return "", None


def _cache_option(output: Any, rows: Tensor) -> dict[str, Any]:
    """Return the option with which the next call continues these rows; empty if it cannot."""
    name, cache = cache_of(output)
    try:
        cache.batch_select_indices(rows)
    except (AttributeError, NotImplementedError):
        return {}  # the next call computes the cache of all tokens anew
    return {name: cache}


@contextmanager
def with_requires_grad(model: Any) -> Iterator[None]:
    """Let weights require gradients, as when transformers loads them; none are computed."""
    # Only then does torch fold a product into one of matrices. Otherwise a head in bfloat16 that
    # reads one position takes thirty times as long on a CPU, which users of transformers never see.
    weights = model.parameters() if getattr(model, "hf_quantizer", None) is None else ()
    # A weight that accelerate put back on disk while a text was measured can require none.
    changed = [
        weight.requires_grad_(True)
        for weight in weights
        if weight.is_floating_point() and not (weight.requires_grad or weight.is_inference())
    ]
    try:
        yield
    finally:
        for weight in changed:
            weight.requires_grad_(False)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, by the tokenizer and by the generation settings."""
    setting = getattr(model.generation_config, "eos_token_id", None)
    listed = setting if isinstance(setting, list | tuple) else [setting]
    return {token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)}
