"""A few words of the dense and of the pruned model: perplexity hides a collapse that one sentence shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.forward.engines import same_numbers
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.plan import SampleGeneration
from sleb_plugins import UnsupportedModelError

PROMPT = "A river begins as snow on a mountain. In spring the water runs down over the rocks,"
NEW_TOKENS = 48

# Runs of so many tokens are what a repetition is made of.
RUN = 4


def generate_sample(
    skippable: SkippableModel, tokenizer: Any, removed: Collection[int], longest: int | None, notify: Notify
) -> SampleGeneration | None:
    """Let the model go on from a fixed prompt, without the removed blocks and with them: greedily, so always the same.

    None, with a notice, where the model cannot be heard.

    Args:
        skippable: the model.
        tokenizer: its tokenizer.
        removed: the blocks that are gone.
        longest: how many positions the model has; None where there is no limit.
        notify: told of progress.
    """
    ids = tokenizer(PROMPT).input_ids
    count = min(NEW_TOKENS, (longest or NEW_TOKENS + len(ids)) - len(ids))
    if not ids or max(ids) >= skippable.model.get_input_embeddings().num_embeddings or count < 1:
        notify(Notice("No text of the pruned model is shown: its tokenizer or positions leave no room for a prompt."))
        return None
    ends = {tokenizer.eos_token_id} - {None}
    prompt = torch.tensor([ids], device=skippable.model.device)
    notify(TaskStarted(task := "Listening to both models", 2 * count, "tokens"))
    try:
        spoken = []
        for off in ((), tuple(removed)):
            said = _generate(skippable, prompt, off, count, ends)
            spoken.append(_continue(skippable, prompt, off, count, ends) if said is None else said)
            notify(TaskAdvanced(task, count))
    except UnsupportedModelError as error:
        notify(Notice(f"No text of the pruned model is shown: {error.message}"))
        return None
    finally:
        notify(TaskFinished(task))
    dense, pruned = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in spoken)
    return SampleGeneration(
        prompt=PROMPT,
        new_tokens=count,
        dense=dense,
        pruned=pruned,
        dense_repetition=repetition(spoken[0]),
        pruned_repetition=repetition(spoken[1]),
    )


@torch.inference_mode()
def _generate(
    skippable: SkippableModel, prompt: Tensor, removed: Sequence[int], count: int, ends: Collection[int]
) -> list[int] | None:
    """Give the likeliest next tokens with the KV cache; None where it does not bear that blocks are off.

    What came out is held against one pass without it.
    """
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=count, use_cache=True, eos_token_id=sorted(ends) or None, pad_token_id=0
    )
    skippable.switch_off(removed)
    try:
        with translate_errors(lambda words: UnsupportedModelError(words, hint="")):
            ids = skippable.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    except UnsupportedModelError:
        return None
    new = ids[:, prompt.shape[1] :]
    logits = skippable.logits(ids[:, :-1], removed)[:, prompt.shape[1] - 1 :]
    if not same_numbers(logits.amax(-1), logits.gather(-1, new[..., None])[..., 0]):
        return None
    return [token for token in new[0].tolist() if token not in ends]


@torch.inference_mode()
def _continue(
    skippable: SkippableModel, prompt: Tensor, removed: Sequence[int], count: int, ends: Collection[int]
) -> list[int]:
    """Give the likeliest next tokens without the KV cache, one after another, up to the one that ends a text."""
    ids = prompt
    for _ in range(count):
        best = skippable.logits(ids, removed, last=1)[:, -1:].argmax(-1)
        if int(best) in ends:
            break
        ids = torch.cat([ids, best], dim=1)
    new: list[int] = ids[0, prompt.shape[1] :].tolist()
    return new


def repetition(tokens: Sequence[int]) -> float:
    """Give the share of the runs of 4 tokens that occurred before in the same text: 0 says something new throughout.

    That is 1 minus the distinct share of n-grams with n = 4 (seq-rep-4 of Welleck et al., ICLR 2020, arXiv:1908.04319,
    equation 10).
    """
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
