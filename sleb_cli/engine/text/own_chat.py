"""Conversations that the model writes: it answers given prompts, or questions of its own.

Given only what its chat template puts before a user's words, a chat model writes such words
(Magpie, Xu et al., arXiv 2406.08464, section 2). Both sides are sampled at temperature 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from typing import Any

from sleb_cli.engine.model.generation import end_tokens
from sleb_cli.engine.text.chat import Tokens, apply_template, pack
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.writing import GIVE_TEXT, Continue, Writing, write_or_find
from sleb_cli.events import Notice, Notify
from sleb_cli.repetition import repetition
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import Conversation
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError, UsageError

MARK = "WORDS"
"""Stands for a message, to find a template's text around it."""
CONVERSATIONS_TASK = "Writing conversations"

QUESTION = "QUESTION"
"""Stands for the question before an answer."""

MAX_REPETITION = 0.5
"""A message that repeats more of its words is dropped."""

SPARE = 2
"""How many conversations are begun for each sequence at first.

Some are dropped, and some are short.
"""
MIN_AT_ONCE = 8
"""At least this many are begun at once: fewer take nearly as long."""
MAX_FRUITLESS = 64
"""After so many in a row of which none can be used, the model is taken to write none."""
MIN_TURN_TOKENS = 32
"""A question needs room for this many tokens."""


def write_conversations(
    model: Any, tokenizer: Any, source: str, settings: CalibrationSettings, notify: Notify
) -> list[Tokens]:
    """Let the model write conversations for the settings' samples, or find them in the cache.

    Conversations are dropped if a message repeats itself or does not end, unless an answer fills
    its sequence. Thoughts are part of an answer.

    Raises:
        UsageError: sequences are too short for the chat template.
        UnsupportedModelError: the model cannot generate text, or nothing that can be used.
    """
    prompts = text_source(source).prompts(settings.split)
    length = settings.sequence_length
    drawn = f"{settings.seed}/{settings.split.begin:g}"

    def write(more: Continue, size: int) -> list[Tokens]:
        writer = _Writer(model, tokenizer, source, length, more)
        order = random.Random(drawn).sample(prompts, len(prompts))
        written = writer.write(settings.samples, size, cycle(order))
        begun = len(written) + writer.dropped
        message = f"{source}: the model wrote {plural(begun, 'conversation')}"
        if writer.dropped:
            message += (
                f", of which {len(written)} are used; {writer.dropped} did not end, or repeated "
                "themselves"
            )
        cut = sum(len(tokens) >= length for tokens in written)
        if 2 * cut > len(written):
            message += (
                f"; {cut} of those used are cut at {length} tokens, and might end with a larger "
                "--sequence-length"
            )
        notify(Notice(f"{message}."))
        return written

    writing = Writing(
        title=f"{CONVERSATIONS_TASK} for {plural(settings.samples, 'sequence')}",
        noun="conversation",
        count=SPARE * settings.samples,
        new=length,
        seed=int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7]),
        model=settings.writer,
        key={
            "source": source,
            "drawn": drawn,
            "prompts": prompts,
            "template": tokenizer.chat_template,
            "turns": 1,
            "cut": "begins the next",
        },
    )
    return write_or_find(model, writing, write, notify)


class _Writer:
    """Writes conversations of a question and an answer; `dropped` counts those without use."""

    def __init__(
        self, model: Any, tokenizer: Any, source: str, length: int, more: Continue
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.length = length
        self.more = more
        self.dropped = 0
        self.asked: set[str] = set()
        self.added: dict[int, Any] = tokenizer.added_tokens_decoder
        self.special = {token for token, added in self.added.items() if added.special}
        self.render = partial(apply_template, tokenizer, source=source, tokenize=False)

    def write(self, count: int, size: int, prompts: Iterator[Conversation]) -> list[Tokens]:
        """Write until the conversations fill `count` sequences, at most `size` at once.

        The model answers the prompts or, without any, questions of its own.
        """
        written = list[Tokens]()
        begun = 0
        fruitless = 0
        while True:
            missing = count - len(pack(written, self.length))
            if missing <= 0:
                return written
            # Conversations that a sequence has taken so far.
            for_one = SPARE if missing == count else begun / (count - missing)
            fresh = min(size, max(MIN_AT_ONCE, math.ceil(for_one * missing)))
            questions = list(islice(prompts, fresh))
            if not questions:  # no prompts were given
                questions = self._write_questions(fresh)
            complete = self._write_answers(questions)
            written += complete
            begun += fresh
            self.dropped += fresh - len(complete)
            fruitless = 0 if complete else fruitless + fresh
            if fruitless >= MAX_FRUITLESS:
                raise UnsupportedModelError(
                    f"{self.source}: none of {fruitless} conversations that the model wrote can be "
                    f"used, as they do not end, repeat themselves, or do not fit {self.length} "
                    "tokens.",
                    hint=GIVE_TEXT,
                )

    def _write_questions(self, count: int) -> list[Conversation]:
        before, after = self._text_around([], "user")
        ending = _first_line(after)
        prompt = self._encode(before)
        room = self.length - len(prompt)
        if room < MIN_TURN_TOKENS:
            raise UsageError(
                f"{self.source} does not fit sequences of {self.length} tokens: the chat template "
                f"alone takes {len(prompt)}.",
                hint="Use a larger --sequence-length.",
            )
        ends = self._find_ends(ending)
        new = self._limit(room // 2, len(prompt))
        questions = []
        for tokens in self.more([prompt] * count, new, forbidden=self.special - ends, ends=ends):
            words, _, has_ended = self._cut_at_end(tokens, ends, ending)
            if has_ended and _is_useful(words) and words not in self.asked:
                self.asked.add(words)
                questions.append([{"role": "user", "content": words}])
        return questions

    def _write_answers(self, conversations: list[Conversation]) -> list[Tokens]:
        """Answer the conversations that leave room for it; return those with a useful answer."""
        prompts = []
        for conversation in conversations:
            prompt = self._encode(self.render(conversation, add_generation_prompt=True))
            if 0 < len(prompt) < self.length:
                prompts.append(prompt)
        if not prompts:
            return []
        question = {"role": "user", "content": QUESTION}
        _, after = self._text_around([question], "assistant")
        ending = _first_line(after)
        space = self._encode(after[len(after.rstrip()) :])
        ends = self._find_ends(ending)
        forbidden = self.special - ends - self._find_tokens_of_thoughts()
        lengths = list(map(len, prompts))
        new = self._limit(self.length - min(lengths), max(lengths))
        answered = []
        answers = self.more(prompts, new, forbidden=forbidden, ends=ends)
        for prompt, answer in zip(prompts, answers, strict=True):
            words, tokens, has_ended = self._cut_at_end(answer, ends, ending)
            # The end of the sequence may cut an answer, but no limit of the model before it.
            fills_sequence = len(prompt) + new >= self.length
            if (has_ended or fills_sequence) and _is_useful(words):
                rendered = [(token, False) for token in prompt]
                rendered += [(token, True) for token in tokens]
                if has_ended:  # the template's space behind an answer does not count
                    rendered += [(token, False) for token in space]
                answered.append(rendered)
        return answered

    def _limit(self, new: int, longest_prompt: int) -> int:
        """Return how many new tokens the model's positions allow, if they are learned, and end."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions:
            new = min(new, positions - longest_prompt)
        return max(1, new)

    def _cut_at_end(
        self, tokens: list[int], ends: set[int], ending: str
    ) -> tuple[str, list[int], bool]:
        """Return the words of a message, its tokens with its end, and whether it has one.

        A token ends it, or the template's ending, written in words.
        """
        has_ended = tokens[-1] in ends
        text = self.tokenizer.decode(tokens[:-1] if has_ended else tokens)
        if ending and ending in text:
            text = text.partition(ending)[0]
            return text.strip(), self._encode(text + ending), True
        return text.strip(), tokens, has_ended

    def _find_ends(self, ending: str) -> set[int]:
        """Return the tokens that end a message: the model's, and an added one of the template."""
        ends = end_tokens(self.model, self.tokenizer)
        for token in self._encode(ending)[:1]:
            if token in self.added:
                ends.add(token)
        return ends

    def _find_tokens_of_thoughts(self) -> set[int]:
        """Return the tokens that may stand around a thought."""
        tokens = set[int]()
        for token, added in self.added.items():
            if "think" in added.content.lower():
                tokens.add(token)
        question = {"role": "user", "content": MARK}
        answer = {"role": "assistant", "content": MARK, "reasoning_content": MARK, "thinking": MARK}
        prompt = self.render([question], add_generation_prompt=True)
        whole = self.render([question, answer])
        if whole.startswith(prompt):
            tokens.update(self._encode(whole.removeprefix(prompt)))
        return tokens

    def _text_around(self, before: Conversation, role: str) -> tuple[str, str]:
        """Split a template's text into the parts before and after the words of a message."""
        message = {"role": role, "content": MARK}
        whole = self.render([*before, message], add_generation_prompt=role == "user")
        text_before, _, text_after = whole.rpartition(MARK)
        if not text_before:
            raise UsageError(
                f"The chat template does not show where the words of a {role} begin, so the model "
                f"cannot write {self.source}.",
                hint=GIVE_TEXT,
            )
        return text_before, text_after

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _is_useful(words: str) -> bool:
    return bool(words) and repetition(words.split()) <= MAX_REPETITION
