"""Calibration sequences of conversations, as the model's own chat template writes them."""

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

# How a template says itself what the model writes.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens, and which of them count where they are predicted."""

    ids: list[int]
    loss_mask: list[bool]


def require_template(tokenizer: Any) -> None:
    """Make sure that the tokenizer can write conversations.

    Raises:
        UsageError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "The tokenizer has no chat template, so it cannot write conversations.",
            hint="Leave out --chat, or name a model that was trained to chat.",
        )


def cut_conversations(
    tokenizer: Any, text: Conversations, length: int, *, answers: bool, asked: int | None
) -> tuple[Tensor, Tensor]:
    """Cut conversations into sequences, int64 [sequences, length], and say which tokens count, bool of that shape.

    Each sequence begins where a conversation begins, and holds as many as fit; what stands beyond its end is left out.
    All tokens count, or with `answers` those that the assistant writes; a sequence in which none counts is left out.

    Raises:
        DataError: the template refuses a conversation, or there are fewer sequences than `asked`, or none.
    """
    renderer = _Renderer(tokenizer, text.source)
    rendered = [renderer.render(conversation, answers=answers) for conversation in text.content]
    sequences = [pack for pack in _packs(rendered, length) if any(pack.loss_mask[1:])]
    if not sequences:
        tokens = sum(len(conversation.ids) for conversation in rendered)
        raise DataError(
            f"The conversations of {text.source} have {tokens} tokens and give no sequence of {length} "
            + ("with an answer in it." if answers else "tokens."),
            hint="Use more of them, or another --sequence-length.",
        )
    require_enough(len(sequences), text.source, length, asked)
    return torch.tensor([pack.ids for pack in sequences]), torch.tensor([pack.loss_mask for pack in sequences])


def _packs(rendered: Iterable[Rendered], length: int) -> Iterator[Rendered]:
    """Fill sequences of exactly `length` tokens, each from the start of a conversation on."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    for conversation in rendered:
        ids, loss_mask = ids + conversation.ids, loss_mask + conversation.loss_mask
        if len(ids) >= length:
            yield Rendered(ids[:length], loss_mask[:length])
            ids, loss_mask = [], []


@dataclass(frozen=True)
class _Renderer:
    """Writes the conversations of a source with a tokenizer's chat template."""

    tokenizer: Any
    source: str

    def render(self, conversation: Conversation, *, answers: bool) -> Rendered:
        """Write a conversation in tokens; the template adds what the model expects, a BOS too where it does."""
        if not answers:
            ids = self._template(conversation, return_dict=True)["input_ids"]
            return Rendered(ids, [True] * len(ids))
        if self.tokenizer.is_fast and _GENERATION.search(str(self.tokenizer.chat_template)):
            written = self._template(conversation, return_dict=True, return_assistant_tokens_mask=True)
            return Rendered(written["input_ids"], [bool(own) for own in written["assistant_masks"]])
        return self._find_answers(conversation)

    def _find_answers(self, conversation: Conversation) -> Rendered:
        """Tell the answers by what each adds to the prompt before it, up to the token that ends it.

        Prompt and answer are made tokens apart, as when the model generates.

        Raises:
            DataError: the template writes the beginning of a conversation otherwise when it goes on.
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
                    f"The chat template writes the beginning of a conversation of {self.source} otherwise when it goes "
                    "on, so the answers cannot be told apart.",
                    hint="Use --chat all, or conversations of one question and one answer.",
                )
            pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            done = len(answered)
        pieces.append((whole[done:], False))
        tokens = [(self.tokenizer(piece, add_special_tokens=False).input_ids, own) for piece, own in pieces if piece]
        return Rendered([t for ids, _ in tokens for t in ids], [own for ids, own in tokens for _ in ids])

    def _template(self, conversation: Conversation, **options: Any) -> Any:
        """Apply the template.

        Raises:
            DataError: it does not take the conversation.
        """
        with translate_errors(self._refused):
            return self.tokenizer.apply_chat_template(conversation, **options)

    def _refused(self, words: str) -> DataError:
        return DataError(
            f"The chat template does not take a conversation of {self.source}: {words}.",
            hint="Leave that conversation out; many templates want user and assistant in turn.",
        )
