"""Let both models write a few words: a sentence shows a collapse that perplexity hides.

A chat model answers a question in its template; others continue a text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.forward.fork_check import equal_up_to_rounding
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.generation import end_tokens, generate
from sleb_cli.engine.text.chat import apply_template
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import SampleGeneration
from sleb_cli.repetition import repetition
from sleb_cli.texts.source import Conversation
from sleb_plugins import DataError, UnsupportedModelError
from sleb_plugins.errors import OutOfMemory, explain_out_of_memory

PROMPT = "A river begins as snow on a mountain. In spring the water runs down over the rocks,"
QUESTION = "In one sentence, how does a river begin?"


def generate_sample(
    skippable: SkippableModel,
    tokenizer: Any,
    removed: Collection[int],
    new_tokens: int,
    longest: int | None,
    notify: Notify,
    absent: AbstractContextManager[object] | None = None,
) -> SampleGeneration | None:
    """Let both models answer a question, or continue a text, greedily.

    Returns None, with a notice, if memory or positions are too few.

    The pruned model is the dense one without the `removed` blocks, in the context `absent`.
    """
    given, ids = _prompt(tokenizer)
    count = min(new_tokens, (longest or new_tokens + len(ids)) - len(ids))
    if not ids or max(ids) >= skippable.model.get_input_embeddings().num_embeddings or count < 1:
        why = "the prompt does not fit the model's tokens or positions"
        notify(Notice(f"No sample text is shown: {why}."))
        return None
    ends = end_tokens(skippable.model, tokenizer)
    prompt = torch.tensor([ids], device=skippable.device)
    with task(notify, "Generating text with both models", 2 * count, "tokens") as advance:
        try:
            with explain_out_of_memory(f"out of memory on {skippable.device}.", hint=""):
                dense = _continue(skippable, prompt, (), count, ends)
                advance(count)
                with absent or nullcontext():
                    pruned = _continue(skippable, prompt, tuple(removed), count, ends)
                advance(count)
        except (UnsupportedModelError, OutOfMemory) as error:
            notify(Notice(f"No sample text is shown: {error.message}"))
            return None
    return SampleGeneration(
        prompt=given,
        new_tokens=count,
        dense=_decode(tokenizer, dense),
        pruned=_decode(tokenizer, pruned),
        dense_repetition=repetition(dense),
        pruned_repetition=repetition(pruned),
    )


def _prompt(tokenizer: Any) -> tuple[str, list[int]]:
    """Return what both models are given, and its tokens."""
    if getattr(tokenizer, "chat_template", None):
        chat: Conversation = [{"role": "user", "content": QUESTION}]
        with suppress(DataError):
            text = apply_template(
                tokenizer, chat, "the sample", tokenize=False, add_generation_prompt=True
            )
            return QUESTION, tokenizer(text, add_special_tokens=False).input_ids
    return PROMPT, tokenizer(PROMPT).input_ids


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    # A model may have more tokens than its tokenizer, and slow tokenizers raise for these.
    known = set(tokenizer.get_vocab().values())
    return str(
        tokenizer.decode([token for token in ids if token in known], skip_special_tokens=True)
    )


@torch.inference_mode()
def _continue(
    skippable: SkippableModel,
    prompt: Tensor,
    removed: Sequence[int],
    count: int,
    ends: Collection[int],
) -> list[int]:
    start = prompt.shape[1]
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=count,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    skippable.skip(removed)
    # One pass without the KV cache checks the tokens that are generated with it. If the cache does
    # not work with skipped blocks, each token takes such a pass.
    with suppress(UnsupportedModelError):
        ids = generate(
            skippable.model, prompt, greedy, lambda words: UnsupportedModelError(words, hint="")
        )
        new = ids[:, start:]
        logits = skippable.logits(ids[:, :-1], removed)[:, start - 1 :]
        if equal_up_to_rounding(logits.amax(-1), logits.gather(-1, new[..., None])[..., 0]):
            return [token for token in new[0].tolist() if token not in ends]
    ids = prompt
    for _ in range(count):
        best = skippable.logits(ids, removed, last=1)[:, -1:].argmax(-1)
        if int(best) in ends:
            break
        ids = torch.cat([ids, best], dim=1)
    return list(ids[0, start:].tolist())
