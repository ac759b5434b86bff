"""Cut conversations, rendered with the model's chat template, into calibration sequences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile, tee
from typing import Any, cast

import torch
from torch import Tensor

from sleb_cli.engine.text.windows import EvaluationWindows, begin_with_bos, require_enough
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_cli.texts.source import Conversation, Text
from sleb_plugins import DataError, UsageError

# The tag with which a template marks what the model writes.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The words of an answer, behind a thought.
_WORDS = re.compile(
    r"(?:(?:\s*<\w+>)?(?P<thought>.*)</(?:think|thought)\w*>)?\s*(?P<words>.*?)\s*", re.DOTALL
)
_FIRST_MARK = 0xF0000
"""The first character of a plane that Unicode leaves to private use, so no text has it."""
_TODAY = (
    "{%- macro strftime_now(format) -%}{{ format.replace('%Y', '2025').replace('%m', "
    "'01').replace('%d', '01')"
    ".replace('%b', 'Jan').replace('%B', 'January') }}{%- endmacro -%}"
)
"""Gives a template a fixed date: tokens that change overnight would keep an interrupted run from
continuing.
"""

Tokens = list[tuple[int, bool]]
"""Tokens, and whether they count in the loss."""


def require_template(tokenizer: Any, what: str) -> None:
    """Raise a UsageError, about `what` needs it, unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{what} needs a chat template, but the tokenizer has none.",
            hint=f"Leave out {what}, or name a chat model.",
        )


def apply_template(tokenizer: Any, conversation: Conversation, source: str, **options: Any) -> Any:
    """Write a conversation of this source by the chat template; raise a DataError if the template
    refuses it.
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
    """Cut conversations into sequences, int64 [sequences, length], with a loss mask, bool of the
    same shape.

    Each sequence starts with a conversation and holds as many as fit; the rest of the last one is
    dropped. With `answers`, sequences without any are dropped; else all tokens count, and there is
    no mask.

    Raises:
        DataError: there are fewer sequences than `required`, or none.
    """
    sequences = [*pack(rendered, length)]
    if not sequences:
        raise _too_few(source, rendered, length, answers=answers)
    require_enough(len(sequences), source, length, required)
    packed = torch.tensor(sequences, dtype=torch.int64)
    return packed[..., 0].contiguous(), packed[..., 1].bool() if answers else None


def cut_answers(tokenizer: Any, text: Text, length: int, most: int | None) -> EvaluationWindows:
    """Cut a text of conversations into windows, at most `most`, of which the answers are predicted.

    Raises:
        DataError: the template refuses a conversation, or there are too few for a window.
    """
    rendered, seen = tee(
        render(tokenizer, messages, text.source, answers=True) for messages in text.conversations
    )
    most = min(filter(None, (most, text.limit)), default=None)
    packed = torch.tensor([*islice(pack(rendered, length), most)], dtype=torch.int64)
    if not len(packed):
        raise _too_few(text.source, [*seen], length, answers=True)
    ids, counted = packed[..., 0].contiguous(), packed[:, 1:, 1].bool()
    return EvaluationWindows(
        text=text,
        ids=ids,
        counted=counted,
        clusters=packed[:, 1:, 2],
        clustered_by="conversations",
        bos="windows" if begin_with_bos(tokenizer, ids) else "none",
    )


def pack(rendered: Iterable[Tokens], length: int) -> Iterator[list[tuple[int, bool, int]]]:
    """Yield sequences of `length` tokens: each token, whether it counts, and the number of its
    conversation.

    A sequence starts with a conversation, and has a token that counts.
    """
    sequence = list[tuple[int, bool, int]]()
    for number, conversation in enumerate(rendered):
        sequence += [(token, counts, number) for token, counts in conversation]
        if len(sequence) >= length:
            if any(counts for _, counts, _ in sequence[1:length]):
                yield sequence[:length]
            sequence = []


def _too_few(source: str, rendered: Sequence[Tokens], length: int, *, answers: bool) -> DataError:
    return DataError(
        f"The conversations of {source} have {sum(map(len, rendered))} tokens, too few for a "
        f"sequence of {length} " + ("with an answer in it." if answers else "tokens."),
        hint="Use more conversations, or another --sequence-length.",
    )


def render(tokenizer: Any, conversation: Conversation, source: str, *, answers: bool) -> Tokens:
    """Return a conversation as tokens; with `answers`, only answers count, with their end and their
    thoughts.

    Raises:
        DataError: the template refuses the conversation, or changes its words.
    """
    template = partial(apply_template, tokenizer, source=source)
    if not answers:
        return [(token, True) for token in template(conversation, return_dict=True)["input_ids"]]
    if tokenizer.is_fast and _GENERATION.search(str(tokenizer.chat_template)):
        written = template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        return [
            (token, bool(counts))
            for token, counts in zip(written["input_ids"], written["assistant_masks"], strict=True)
        ]
    # Prompt and answer are tokenized separately, as in generation.
    pieces = _split_at_answers(tokenizer, partial(template, tokenize=False), conversation, source)
    tokens = (
        (tokenizer(piece, add_special_tokens=False).input_ids, counts)
        for piece, counts in pieces
        if piece
    )
    return [(token, counts) for ids, counts in tokens for token in ids]


def _split_at_answers(
    tokenizer: Any, template: Callable[..., str], conversation: Conversation, source: str
) -> Iterator[tuple[str, bool]]:
    # Templates may rewrite earlier answers, so words are found by marks: a character in no text for
    # each message.
    marks = [chr(_FIRST_MARK + turn) for turn in range(len(conversation))]
    marked = [
        {**message, "content": _mark(message, mark)}
        for message, mark in zip(conversation, marks, strict=True)
    ]
    whole, done, no_marks = template(marked), 0, str.maketrans("", "", "".join(marks))
    unfound = DataError(
        f"The chat template leaves out or changes words of a conversation of {source}, so its "
        f"answers cannot be found.",
        hint="Leave it out or, to calibrate, use --chat all.",
    )
    if whole.translate(no_marks) != template(conversation):
        raise unfound
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant" or turn == 0:
            continue
        prompt_mark, answer_mark = marks[turn - 1 : turn + 1]
        begin = whole.rfind(prompt_mark) + 1
        opened = template(marked[:turn], add_generation_prompt=True).rpartition(prompt_mark)[2]
        answered = template(marked[: turn + 1]).rpartition(prompt_mark)[2].rstrip()
        rest = whole[begin:]
        start = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opened, rest, strict=False))
        )
        words, end = rest.find(answer_mark), rest.rfind(answer_mark) + 1
        if not begin or not (end if message["content"] else rest.startswith(answered)):
            raise unfound
        if end:
            # A template may cut a thought, and the first mark with it.
            led = rest[start:words].strip() if rest.count(answer_mark) == 2 else ""
            if led and not _holds_thought(message, led):
                start = words  # what a template writes where there is no thought
            end += _ending_length(
                tokenizer, rest[end:], answered[answered.rfind(answer_mark) + 1 :]
            )
        else:  # it only calls tools
            end = len(answered)
        yield whole[done : begin + start].translate(no_marks), False
        yield rest[start:end].translate(no_marks), True
        done = begin + end
    yield whole[done:].translate(no_marks), False


def _mark(message: Mapping[str, Any], mark: str) -> str:
    # The mark stands behind the words and, if the model wrote them, also before them.
    content = message["content"]
    if message["role"] != "assistant":
        return f"{content}{mark}"
    begin, end = _words(message).span("words")
    return f"{content[:begin]}{mark}{content[begin:end]}{mark}{content[end:]}" if content else ""


def _words(message: Mapping[str, Any]) -> re.Match[str]:
    return cast(re.Match[str], _WORDS.fullmatch(message["content"]))  # any text matches


def _holds_thought(message: Mapping[str, Any], text: str) -> bool:
    given = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    thought = next(filter(None, given), None) or _words(message)["thought"] or ""
    return bool(thought.strip()) and thought.strip() in text


def _ending_length(tokenizer: Any, text: str, last_ending: str) -> int:
    # An answer ends as a last answer does or, within a conversation, with an added token.
    if text.startswith(last_ending):
        return len(last_ending)
    end, added = text.lstrip(), [token.content for token in tokenizer.added_tokens_decoder.values()]
    return max(
        (len(text) - len(end) + len(token) for token in added if end.startswith(token)), default=0
    )
