"""Conversations that the model writes itself: it answers given prompts, or prompts that it writes, too.

Given only what its chat template puts before a user's words, a chat model writes such words (Magpie, Xu et al., arXiv
2406.08464, section 2). Both sides are sampled at temperature 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import suppress
from itertools import compress, cycle, islice
from typing import Any

from sleb_cli.canaries.repetition import repetition
from sleb_cli.engine.model.generation import end_tokens
from sleb_cli.engine.text.chat import Tokens, apply_template, pack, render
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.sources import SELF_CHAT, Conversation, read_prompts
from sleb_cli.engine.text.writing import GIVE_TEXT, Continue, Writing, write_or_find
from sleb_cli.events import Notice, Notify
from sleb_cli.units import plural
from sleb_plugins import DataError, UnsupportedModelError, UsageError

MARK = "WORDS"
"""Stands for a message in a template, to find what is before and behind it."""

MOST_REPETITION = 0.5
"""A message that repeats more of its words is dropped."""

TWO_TURNS = 4
"""Every fourth conversation that leaves room for it gets a second turn."""
SPARE = 2
"""How many conversations are begun for each sequence at first: some are dropped, and some are short."""
FEWEST_AT_ONCE = 8
"""The fewest that are begun at once, as few take nearly as long as these."""
MOST_FRUITLESS = 64
"""After so many conversations in a row of which none can be used, the model is taken to write none."""
FEWEST_TOKENS = 32
"""The least room for a turn."""
SPARE_TOKENS = 8
"""What is written beyond a sequence, so that an answer that was cut reaches its end when it is tokenized again."""


def write_conversations(
    model: Any, tokenizer: Any, source: str, settings: CalibrationSettings, notify: Notify
) -> list[Conversation]:
    """Let the model write conversations for as many sequences as the settings have samples, or find them in the cache.

    Those whose message does not end or that repeat themselves are dropped. An answer that does not end fills its
    sequence.

    Raises:
        UsageError: sequences are too short for the chat template.
        UnsupportedModelError: the model cannot generate text, or nothing that can be used.
    """
    given = [] if source == SELF_CHAT else read_prompts(source, settings.split)
    count, length = settings.samples, settings.sequence_length
    drawn, answers = f"{settings.seed}/{settings.split.begin:g}", settings.counts_own_answers
    writer = _Writer(model, tokenizer, source, length, answers=answers)

    def write(more: Continue, size: int) -> list[Conversation]:
        order = random.Random(drawn).sample(given, len(given))
        found = writer.write(more, size, count, cycle(order))
        dropped = f", without {writer.dropped} that did not end or repeated themselves" * bool(writer.dropped)
        notify(Notice(f"{source}: the model wrote {plural(len(found), 'conversation')}{dropped}."))
        return found

    key = {"source": source, "drawn": drawn, "prompts": given, "template": tokenizer.chat_template, "answers": answers}
    seed = int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7])
    writing = Writing("Writing conversations", SPARE * count, length, seed, settings.writer, key)
    found, was_kept = write_or_find(model, writing, write, notify)
    if was_kept:
        notify(Notice(f"Using {plural(len(found), 'conversation')} that the model wrote before, from the cache."))
    conversations: list[Conversation] = found
    return conversations


class _Writer:
    """Writes conversations in rounds; `dropped` counts those that cannot be used."""

    def __init__(self, model: Any, tokenizer: Any, source: str, length: int, *, answers: bool) -> None:
        self.model, self.tokenizer, self.source, self.length = model, tokenizer, source, length
        self.answers, self.dropped = answers, 0
        self.asked: set[str] = set()
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.ends = end_tokens(model, tokenizer)

    def write(self, more: Continue, size: int, count: int, prompts: Iterator[Conversation]) -> list[Conversation]:
        """Write until there are `count` sequences, at most `size` conversations at once."""
        self._render([{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}])  # or refuse at once
        found, rendered, self.dropped = list[Conversation](), list[Tokens](), 0
        self.asked.clear()
        again = list[int]()  # which of those found get a second turn in the next round
        begun = fruitless = 0
        while (missing := count - sum(1 for _ in pack(rendered, self.length))) > 0:
            for_one = SPARE if missing == count else begun / (count - missing)
            fresh = max(1, min(size, max(FEWEST_AT_ONCE, math.ceil(for_one * missing))) - len(again))
            begun += fresh
            given = list(islice(prompts, fresh))
            asked = given or self._add("user", more, [*(found[at] for at in again), *([[]] * fresh)])
            ended = {place: each for place, each in enumerate(asked) if each}
            answered = dict(zip(ended, self._add("assistant", more, [*ended.values()]), strict=True))
            for place, at in enumerate(again):
                if longer := answered.pop(place, None):
                    with suppress(DataError):  # a template that changes the first turn for the second
                        found[at], rendered[at] = longer, self._render(longer)
            complete = [
                (each, tokens) for each in answered.values() if each and self._counts(tokens := self._render(each))
            ]
            self.dropped += fresh - len(complete)
            fruitless = 0 if complete else fruitless + fresh
            if fruitless >= MOST_FRUITLESS:
                raise UnsupportedModelError(
                    f"{self.source}: none of {fruitless} conversations that the model wrote can be used, as they do "
                    f"not end, repeat themselves, or do not fit {self.length} tokens.",
                    hint=GIVE_TEXT,
                )
            new = range(len(found), len(found) + len(complete))
            found += [conversation for conversation, _ in complete]
            rendered += [tokens for _, tokens in complete]
            again = [at for at in new[::TWO_TURNS] if self.length - len(rendered[at]) >= FEWEST_TOKENS and not given]
        return found

    def _counts(self, tokens: Tokens) -> bool:
        """Whether a sequence that begins with this conversation has a token that counts."""
        return any(counts for _, counts in tokens[1 : self.length])

    def _render(self, conversation: Conversation) -> Tokens:
        return render(self.tokenizer, conversation, self.source, answers=self.answers)

    def _add(self, role: str, more: Continue, conversations: list[Conversation]) -> list[Conversation | None]:
        """Add a message to each; None where it repeats itself or, of a user's, does not end or was written before.

        An answer that does not end reaches the end of its sequence.
        """
        if not conversations:
            return []
        asks = role == "user"
        prompts, endings = list[list[int]](), list[str]()
        for conversation in conversations:
            before, ending = self._around(conversation, role)
            prompts.append(self.tokenizer(before, add_special_tokens=False).input_ids)
            endings.append(ending)
        fits = [len(prompt) < self.length for prompt in prompts]
        room = self.length - min(map(len, prompts))
        if room < FEWEST_TOKENS and asks and not conversations[0]:
            raise UsageError(
                f"{self.source} does not fit sequences of {self.length} tokens: the chat template alone takes "
                f"{self.length - room}.",
                hint="Use a larger --sequence-length.",
            )
        first = self.tokenizer(endings[0], add_special_tokens=False).input_ids[:1]
        ends = self.ends | (set(first) & self.special)
        begun, new = [*compress(prompts, fits)], max(1, room // 2) if asks else max(1, room) + SPARE_TOKENS
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and begun:  # learned positions end there
            new = max(1, min(new, limit - max(map(len, begun))))
        written = iter(more(begun, new, forbidden=self.special - ends, ends=ends) if begun else [])
        found = list[Conversation | None]()
        for prompt, conversation, ending, fit in zip(prompts, conversations, endings, fits, strict=True):
            text = self._text(next(written), ends, ending) if fit else ("", False)
            is_whole = asks or text[1] or len(prompt) + new >= self.length  # no limit cut it within its sequence
            found.append(self._with(role, conversation, text) if is_whole else None)
        return found

    def _text(self, tokens: list[int], ends: set[int], ending: str) -> tuple[str, bool]:
        """Return the text of what was written, and whether it ended, by a token or by what a template puts there."""
        has_ended = tokens[-1] in ends
        text = self.tokenizer.decode(tokens[: len(tokens) - has_ended])
        if ending and ending in text:
            text, has_ended = text.partition(ending)[0], True
        return text.strip(), has_ended

    def _with(self, role: str, conversation: Conversation, written: tuple[str, bool]) -> Conversation | None:
        """Return the conversation with this message, unless it cannot be used."""
        text, has_ended = written
        if not text or repetition(text.split()) > MOST_REPETITION:
            return None
        if role == "user":
            if not has_ended or text in self.asked:
                return None
            self.asked.add(text)
        return [*conversation, {"role": role, "content": text}]

    def _around(self, conversation: Conversation, role: str) -> tuple[str, str]:
        """Return what a template puts before the words of a next message, and the first line of what follows them."""
        messages = [*conversation, {"role": role, "content": MARK}]
        whole = apply_template(self.tokenizer, messages, self.source, tokenize=False, add_generation_prompt=True)
        before, _, after = whole.rpartition(MARK)
        if not before:
            raise UsageError(
                f"The chat template does not show where the words of a {role} begin, so the model cannot write "
                f"{self.source}.",
                hint=GIVE_TEXT,
            )
        return before, after.strip().partition("\n")[0]
