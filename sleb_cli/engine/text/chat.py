"""Cut conversations, rendered with the model's chat template, into calibration sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.text.sources import Conversation, Conversations
from sleb_cli.engine.text.windows import require_enough
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import DataError, UsageError

# The tag with which a template marks what the model writes.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_MOST_ADDED = 1_000_000
_AS_TEXT = {"tokenize": False, "return_dict": False, "return_assistant_tokens_mask": False}


@dataclass(frozen=True)
class Rendered:
    """The tokens of a conversation, and which of them count in the loss."""

    ids: list[int]
    loss_mask: list[bool]


def require_template(tokenizer: Any) -> None:
    """Make sure that the tokenizer has a chat template.

    Raises:
        UsageError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "The tokenizer has no chat template, which --chat needs.",
            hint="Leave out --chat, or name a chat model.",
        )


def cut_conversations(
    tokenizer: Any, text: Conversations, length: int, *, answers: bool, asked: int | None
) -> tuple[Tensor, Tensor]:
    """Cut conversations into sequences, int64 [sequences, length], with a loss mask, bool of the same shape.

    Each sequence starts with a conversation and holds as many as fit; the rest of the last one is dropped. The loss
    mask covers all tokens, or with `answers` those of the assistant; sequences without any are dropped.

    Raises:
        DataError: the template refuses a conversation, or there are fewer sequences than `asked`, or none.
    """
    renderer = _Renderer(tokenizer, text.source)
    rendered = [renderer.render(conversation, answers=answers) for conversation in text.content]
    sequences = [pack for pack in _packs(rendered, length) if any(pack.loss_mask[1:])]
    if not sequences:
        tokens = sum(len(conversation.ids) for conversation in rendered)
        raise DataError(
            f"The conversations of {text.source} have {tokens} tokens, too few for a sequence of {length} "
            + ("with an answer in it." if answers else "tokens."),
            hint="Use more conversations, or another --sequence-length.",
        )
    require_enough(len(sequences), text.source, length, asked)
    return torch.tensor([pack.ids for pack in sequences]), torch.tensor([pack.loss_mask for pack in sequences])


def _packs(rendered: Iterable[Rendered], length: int) -> Iterator[Rendered]:
    """Yield sequences of exactly `length` tokens, each starting with a conversation."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    for conversation in rendered:
        ids, loss_mask = ids + conversation.ids, loss_mask + conversation.loss_mask
        if len(ids) >= length:
            yield Rendered(ids[:length], loss_mask[:length])
            ids, loss_mask = [], []


@dataclass(frozen=True)
class _Renderer:
    """Renders the conversations of a source with a tokenizer's chat template."""

    tokenizer: Any
    source: str

    def render(self, conversation: Conversation, *, answers: bool) -> Rendered:
        """Return a conversation as tokens, including a BOS if the template adds one."""
        if not answers:
            ids = self._template(conversation, return_dict=True)["input_ids"]
            return Rendered(ids, [True] * len(ids))
        if self.tokenizer.is_fast and _GENERATION.search(str(self.tokenizer.chat_template)):
            written = self._template(conversation, return_dict=True, return_assistant_tokens_mask=True)
            return Rendered(written["input_ids"], [bool(own) for own in written["assistant_masks"]])
        return self._find_answers(conversation)

    def _find_answers(self, conversation: Conversation) -> Rendered:
        """Find each answer as the text that it adds to the prompt before it, up to its end token.

        Prompt and answer are tokenized separately, as in generation.

        Raises:
            DataError: the template changes earlier messages when more follow.
        """
        whole = self._template(conversation, tokenize=False)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant" or turn == 0:
                continue
            prompt = self._template(conversation[:turn], tokenize=False, add_generation_prompt=True)
            answered = self._template(conversation[: turn + 1], tokenize=False).rstrip()
            if not (whole.startswith(answered) and answered.startswith(prompt)):
                raise DataError(
                    f"The chat template changes earlier messages of a conversation of {self.source} when more follow, "
                    "so its answers cannot be found.",
                    hint="Use --chat all, or conversations with one question and one answer.",
                )
            pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            done = len(answered)
        pieces.append((whole[done:], False))
        tokens = [(self.tokenizer(piece, add_special_tokens=False).input_ids, own) for piece, own in pieces if piece]
        return Rendered([t for ids, _ in tokens for t in ids], [own for ids, own in tokens for _ in ids])

    def _template(self, conversation: Conversation, **options: Any) -> Any:
        """Apply the template.

        Raises:
            DataError: it refuses the conversation or writes too much.
        """
        longest = _MOST_ADDED + 10 * sum(len(str(message)) for message in conversation)
        with translate_errors(self._refused):
            text = self.tokenizer.apply_chat_template(conversation, **options | _AS_TEXT)
        if len(text) > longest:  # a tokenizer would take hours, or all memory
            raise self._refused(f"it makes {len(text):,} characters of it")
        with translate_errors(self._refused):
            return self.tokenizer.apply_chat_template(conversation, **options)

    def _refused(self, words: str) -> DataError:
        return DataError(
            f"The chat template refuses a conversation of {self.source}: {words}.",
            hint="Leave that conversation out; many templates need user and assistant in turn.",
        )
