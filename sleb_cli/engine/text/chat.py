"""Cut conversations, rendered with the model's chat template, into calibration sequences."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.text.windows import (
    EvaluationWindows,
    TooShort,
    begin_with_bos,
    require_enough,
    too_short,
)
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_cli.texts.source import Conversation, Text
from sleb_plugins import DataError, UsageError

# The tag with which a template marks what the model writes.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The words of an answer, behind a thought.
_ANSWER = re.compile(
    r"(?:(?:\s*<\w+>)?(?P<thought>.*)</(?:think|thought)\w*>)?\s*(?P<words>.*?)\s*", re.DOTALL
)
_MARK = "\U000f0000"
"""A character that Unicode leaves to private use, so no text has it."""
_TODAY = (
    "{%- macro strftime_now(format) -%}"
    "{{ format.replace('%Y', '2025').replace('%m', '01').replace('%d', '01')"
    ".replace('%b', 'Jan').replace('%B', 'January') }}"
    "{%- endmacro -%}"
)
"""Gives a template a fixed date.

Tokens that change overnight would keep an interrupted run from continuing.
"""

Tokens = list[tuple[int, bool]]
"""Tokens, and whether they count in the loss."""

PackedTokens = list[tuple[int, bool, int]]
"""Tokens, whether they count, and the numbers of their conversations."""


def require_template(tokenizer: Any, what: str) -> None:
    """Raise a UsageError, about `what` needs it, unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{what} needs a chat template, but the tokenizer has none.",
            hint=f"Leave out {what}, or name a chat model.",
        )


def apply_template(tokenizer: Any, conversation: Conversation, source: str, **options: Any) -> Any:
    """Write a conversation of this source by the chat template.

    Raises:
        DataError: the template refuses it.
    """
    hint = "Leave it out; many templates need user and assistant to alternate."
    with translate_errors(
        error_saying(DataError, f"The chat template refuses a conversation of {source}", hint)
    ):
        template = _TODAY + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(conversation, chat_template=template, **options)


def cut_conversations(
    rendered: Sequence[Tokens], source: str, length: int, *, answers: bool, required: int | None
) -> tuple[Tensor, Tensor | None]:
    """Cut conversations into sequences, int64 [sequences, length], and a loss mask, bool, alike.

    Each sequence starts with a conversation and holds as many as fit; a last one that is cut begins
    the next sequence as well. With `answers`, each counts once, and sequences without any are
    dropped; else all tokens count, and there is no mask.

    Raises:
        DataError: there are fewer sequences than `required`, or none.
    """
    sequences = pack(rendered, length)
    if not sequences:
        raise _too_few(source, rendered, length, answers=answers)
    require_enough(len(sequences), source, length, required)
    packed = torch.tensor(sequences, dtype=torch.int64)
    ids = packed[..., 0].contiguous()
    if not answers:
        return ids, None
    return ids, packed[..., 1].bool()


def cut_answers(tokenizer: Any, text: Text, length: int, most: int | None) -> EvaluationWindows:
    """Cut a text of conversations into windows, at most `most`, of which the answers are predicted.

    Raises:
        DataError: the template refuses a conversation, or there are too few for a window.
    """
    rendered = (
        render(tokenizer, conversation, text.source, answers=True)
        for conversation in text.conversations
    )
    windows = pack(rendered, length, min(filter(None, (most, text.limit)), default=None))
    if not windows:
        seen = [
            render(tokenizer, conversation, text.source, answers=True)
            for conversation in text.conversations
        ]
        raise _too_few(text.source, seen, length, answers=True)
    packed = torch.tensor(windows, dtype=torch.int64)
    ids = packed[..., 0].contiguous()
    return EvaluationWindows(
        text=text,
        ids=ids,
        counted=packed[:, 1:, 1].bool(),
        clusters=packed[:, 1:, 2],
        clustered_by="conversations",
        bos="windows" if begin_with_bos(tokenizer, ids) else "none",
    )


def pack(rendered: Iterable[Tokens], length: int, most: int | None = None) -> list[PackedTokens]:
    """Pack conversations into sequences of `length` tokens, at most `most`.

    A sequence starts with a conversation, and has a token that counts. If its last conversation is
    cut, that begins the next sequence as well, where only what was cut off counts.
    """
    sequences = list[PackedTokens]()
    sequence = PackedTokens()
    for number, conversation in enumerate(rendered):
        tokens = [(token, counts, number) for token, counts in conversation]
        room = length - len(sequence)
        full = []  # the sequences that this conversation completes, two at most
        if sequence and len(tokens) > room:
            full.append(sequence + tokens[:room])
            repeated = [(token, False, number) for token, _, _ in tokens[:room]]
            sequence = (repeated + tokens[room:])[:length]
        else:
            sequence += tokens[:length]
        if len(sequence) == length:
            full.append(sequence)
            sequence = []
        sequences += filter(_predicts_any, full)
        if most and len(sequences) >= most:
            break
    return sequences[:most]


def _predicts_any(sequence: PackedTokens) -> bool:
    """Whether a token counts other than the first, which is not predicted."""
    return any(counts for _, counts, _ in sequence[1:])


def _too_few(source: str, rendered: Sequence[Tokens], length: int, *, answers: bool) -> TooShort:
    needed = "with an answer in it." if answers else "tokens."
    tokens = sum(map(len, rendered))
    return too_short(
        f"The conversations of {source} have {tokens} tokens, too few for a sequence of {length} "
        f"{needed}",
        source,
        tokens,
    )


def render(tokenizer: Any, conversation: Conversation, source: str, *, answers: bool) -> Tokens:
    """Return a conversation as tokens.

    With `answers`, only answers count, with their end and their thoughts; else all tokens do.

    Raises:
        DataError: the template refuses the conversation, or changes its words.
    """
    template = partial(apply_template, tokenizer, source=source)
    if not answers:
        written = template(conversation, return_dict=True)
        return [(token, True) for token in written["input_ids"]]
    # Only a fast tokenizer knows which tokens the template's own tags enclose.
    if tokenizer.is_fast and _GENERATION.search(str(tokenizer.chat_template)):
        written = template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        return list(zip(written["input_ids"], map(bool, written["assistant_masks"]), strict=True))
    tokens = Tokens()
    pieces = _split_at_answers(tokenizer, partial(template, tokenize=False), conversation, source)
    # Prompt and answer are tokenized separately, as in generation.
    for piece, counts in pieces:
        if piece:
            for token in tokenizer(piece, add_special_tokens=False).input_ids:
                tokens.append((token, counts))
    return tokens


def _split_at_answers(
    tokenizer: Any, template: Callable[..., str], conversation: Conversation, source: str
) -> list[tuple[str, bool]]:
    # A template may rewrite what came before an answer, so its words are found by a mark.
    unfound = DataError(
        f"The chat template leaves out or changes words of a conversation of {source}, so its "
        f"answers cannot be found.",
        hint="Leave it out or, to calibrate, use --chat all.",
    )
    marked = _mark_answers(conversation)
    marks_in = [message["content"].count(_MARK) for message in marked]
    whole = template(marked)
    marks = [mark.start() for mark in re.finditer(_MARK, whole)]
    if whole.replace(_MARK, "") != template(conversation) or len(marks) != sum(marks_in):
        raise unfound
    pieces = []
    done = 0  # characters in pieces so far
    seen = 0  # marks in the messages so far
    for turn, message in enumerate(marked):
        if message["role"] == "assistant" and turn > 0:
            asked = marks[seen - 1] + 1
            # What the template writes before an answer, and after one that is the last.
            opening = template(marked[:turn], add_generation_prompt=True).rpartition(_MARK)[2]
            ending = template(marked[: turn + 1]).rpartition(_MARK)[2].rstrip()
            begin = asked + len(os.path.commonprefix([opening, whole[asked:]]))  # noqa: RUF071
            if marks_in[turn] == 2:
                words, end = marks[seen : seen + 2]
                led = whole[begin:words].strip()
                if led and not _holds_thought(conversation[turn], led):
                    begin = words  # the template writes this where there is no thought
                end += 1 + _ending_length(tokenizer, whole[end + 1 :], ending)
            elif whole.startswith(ending, asked):  # it only calls tools
                end = asked + len(ending)
            else:
                raise unfound
            pieces += [(whole[done:begin], False), (whole[begin:end], True)]
            done = end
        seen += marks_in[turn]
    pieces.append((whole[done:], False))
    return [(text.replace(_MARK, ""), counts) for text, counts in pieces]


def _mark_answers(conversation: Conversation) -> Conversation:
    # A mark stands on both sides of an answer's words, and behind what the model answers to.
    marked = [dict(message) for message in conversation]
    for message, answer in pairwise(marked):
        if answer["role"] != "assistant":
            continue
        if _MARK not in message["content"]:
            message["content"] += _MARK
        content = answer["content"]
        if content:  # a template may ask whether there are words
            begin, end = _parse_answer(content).span("words")
            answer["content"] = (
                f"{content[:begin]}{_MARK}{content[begin:end]}{_MARK}{content[end:]}"
            )
    return marked


def _parse_answer(content: str) -> re.Match[str]:
    match = _ANSWER.fullmatch(content)
    assert match  # any text matches
    return match


def _holds_thought(message: Mapping[str, Any], text: str) -> bool:
    thought = _parse_answer(message["content"])["thought"]
    for field in ("reasoning", "thinking", "reasoning_content"):
        thought = message.get(field) or thought
    return bool(thought and thought.strip()) and thought.strip() in text


def _ending_length(tokenizer: Any, text: str, ending: str) -> int:
    # An answer ends as a last answer does or, within a conversation, with an added token.
    if text.startswith(ending):
        return len(ending)
    end = text.lstrip()
    lengths = [0]
    for token in tokenizer.added_tokens_decoder.values():
        if end.startswith(token.content):
            lengths.append(len(text) - len(end) + len(token.content))
    return max(lengths)
