"""Cut conversations, rendered with the model's chat template, into calibration sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.text.sources import Conversation, Text
from sleb_cli.engine.text.windows import EvaluationWindows, begin_with_bos, require_enough
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import DataError, UsageError

# The tag with which a template marks what the model writes.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tokens = list[tuple[int, bool]]
"""Tokens, and whether each counts in the loss."""

_Token = TypeVar("_Token", tuple[int, bool], tuple[int, bool, int])


def require_template(tokenizer: Any, what: str) -> None:
    """Make sure that the tokenizer has a chat template, for `what`.

    Raises:
        UsageError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{what} needs a chat template, but the tokenizer has none.",
            hint=f"Leave out {what}, or name a chat model.",
        )


def apply_template(tokenizer: Any, conversation: Conversation, source: str, **options: Any) -> Any:
    """Return a conversation of this source as its chat template writes it.

    Raises:
        DataError: the template refuses it.
    """

    def refused(words: str) -> DataError:
        return DataError(
            f"The chat template refuses a conversation of {source}: {words}.",
            hint="Leave it out; many templates need user and assistant to alternate.",
        )

    with translate_errors(refused):
        return tokenizer.apply_chat_template(conversation, **options)


def cut_conversations(
    tokenizer: Any, conversations: Iterable[Conversation], source: str, length: int, *, answers: bool, asked: int | None
) -> tuple[Tensor, Tensor]:
    """Cut conversations into sequences, int64 [sequences, length], with a loss mask, bool of the same shape.

    Each sequence starts with a conversation and holds as many as fit; the rest of the last one is dropped. The loss
    mask covers all tokens, or with `answers` those of the assistant; sequences without any are dropped.

    Raises:
        DataError: the template refuses a conversation, or there are fewer sequences than `asked`, or none.
    """
    rendered = [render(tokenizer, conversation, source, answers=answers) for conversation in conversations]
    sequences = [*pack(rendered, length)]
    if not sequences:
        raise _too_few(source, rendered, length, answers=answers)
    require_enough(len(sequences), source, length, asked)
    found = torch.tensor(sequences, dtype=torch.int64)
    return found[..., 0].contiguous(), found[..., 1].bool()


def cut_answers(tokenizer: Any, text: Text, length: int, most: int | None) -> EvaluationWindows:
    """Cut a text of conversations into windows, at most `most`, of which the answers are predicted.

    Raises:
        DataError: the template refuses a conversation, or there are too few for a window.
    """
    rendered = list[Tokens]()

    def numbered() -> Iterator[list[tuple[int, bool, int]]]:
        for number, conversation in enumerate(text.conversations):
            rendered.append(render(tokenizer, conversation, text.source, answers=True))
            yield [(token, counts, number) for token, counts in rendered[-1]]

    most = min(filter(None, (most, text.limit)), default=None)
    found = torch.tensor([*islice(pack(numbered(), length), most)], dtype=torch.int64)
    if not len(found):
        raise _too_few(text.source, rendered, length, answers=True)
    ids, counted = found[..., 0].contiguous(), found[:, 1:, 1].bool()
    return EvaluationWindows(
        text=text,
        ids=ids,
        counted=counted,
        clusters=found[:, 1:, 2],
        clustered_by="conversations",
        bos="windows" if begin_with_bos(tokenizer, ids) else "none",
    )


def pack(rendered: Iterable[list[_Token]], length: int) -> Iterator[list[_Token]]:
    """Yield sequences of `length` tokens, each starting with a conversation, and with a token that counts."""
    sequence = list[_Token]()
    for conversation in rendered:
        sequence = sequence + conversation
        if len(sequence) >= length:
            if any(token[1] for token in sequence[1:length]):
                yield sequence[:length]
            sequence = []


def _too_few(source: str, rendered: Sequence[Tokens], length: int, *, answers: bool) -> DataError:
    return DataError(
        f"The conversations of {source} have {sum(map(len, rendered))} tokens, too few for a sequence of {length} "
        + ("with an answer in it." if answers else "tokens."),
        hint="Use more conversations, or another --sequence-length.",
    )


def render(tokenizer: Any, conversation: Conversation, source: str, *, answers: bool) -> Tokens:
    """Return a conversation as tokens, including a BOS if the template adds one."""
    template = partial(apply_template, tokenizer, source=source)
    if not answers:
        return [(token, True) for token in template(conversation, return_dict=True)["input_ids"]]
    if tokenizer.is_fast and _GENERATION.search(str(tokenizer.chat_template)):
        written = template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        return [(token, bool(own)) for token, own in zip(written["input_ids"], written["assistant_masks"], strict=True)]
    # Each answer is the text that it adds to the prompt before it, up to its end token. Prompt and answer are tokenized
    # separately, as in generation.
    whole, pieces, done = template(conversation, tokenize=False), list[tuple[str, bool]](), 0
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant" or turn == 0:
            continue
        prompt = template(conversation[:turn], tokenize=False, add_generation_prompt=True)
        answered = template(conversation[: turn + 1], tokenize=False).rstrip()
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise DataError(
                f"The chat template changes earlier messages of a conversation of {source} when more follow, so its "
                "answers cannot be found.",
                hint="Use conversations with one question and one answer or, to calibrate, --chat all.",
            )
        pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
        done = len(answered)
    pieces.append((whole[done:], False))
    tokens = ((tokenizer(piece, add_special_tokens=False).input_ids, own) for piece, own in pieces if piece)
    return [(token, own) for ids, own in tokens for token in ids]
