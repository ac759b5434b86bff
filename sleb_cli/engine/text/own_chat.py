"""Conversations that the model writes: it answers given prompts, or prompts of its own.

Given only what its chat template puts before a user's words, a chat model writes such words
(Magpie, Xu et al., arXiv
2406.08464, section 2). Both sides are sampled at temperature 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, cycle, islice
from typing import Any, NamedTuple

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

MAX_REPETITION = 0.5
"""A message that repeats more of its words is dropped."""

TWO_TURNS = 4
"""Every fourth conversation that leaves room for it gets a second turn."""
SPARE = 2
"""How many conversations are begun for each sequence at first: some are dropped, and some are
short.
"""
MIN_AT_ONCE = 8
"""At least this many are begun at once: fewer take nearly as long."""
MAX_FRUITLESS = 64
"""After so many conversations in a row of which none can be used, the model is taken to write none.
"""
MIN_TURN_TOKENS = 32
"""A turn needs room for this many tokens."""


@dataclass(frozen=True)
class Draft:
    """A conversation whose answers the model writes.

    `tokens` and `text` end with its last answer. Answers count, and have the tokens that the model
    wrote; the text is None if the template leaves out some of it, such as a thought.
    """

    messages: Conversation = field(default_factory=list)
    tokens: Tokens = field(default_factory=list)
    text: str | None = ""


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
    given = text_source(source).prompts(settings.split)
    count, length = settings.samples, settings.sequence_length
    drawn = f"{settings.seed}/{settings.split.begin:g}"

    def write(more: Continue, size: int) -> list[Tokens]:
        writer = _Writer(model, tokenizer, source, length)
        order = random.Random(drawn).sample(given, len(given))
        drafts = [draft.tokens for draft in writer.write(more, size, count, cycle(order))]
        message = f"{source}: the model wrote {plural(len(drafts), 'conversation')}"
        if writer.dropped:
            message += f", without {writer.dropped} that did not end or repeated themselves"
        if 2 * (cut := sum(len(tokens) >= length for tokens in drafts)) > len(drafts):
            message += f"; {cut} do not end within {length} tokens, but might with a larger --sequence-length"
        notify(Notice(f"{message}."))
        return drafts

    key = {
        "source": source,
        "drawn": drawn,
        "prompts": given,
        "template": tokenizer.chat_template,
        "tokens": True,
    }
    seed = int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7])
    writing = Writing(
        "Writing conversations", "conversation", SPARE * count, length, seed, settings.writer, key
    )
    return write_or_find(model, writing, write, notify)


class _Writer:
    """Writes conversations in rounds; `dropped` counts those that cannot be used."""

    def __init__(self, model: Any, tokenizer: Any, source: str, length: int) -> None:
        self.model, self.tokenizer, self.source, self.length = model, tokenizer, source, length
        self.dropped, self.prompts = 0, set[str]()
        self.added = tokenizer.added_tokens_decoder
        self.ends = end_tokens(model, tokenizer)

    def write(
        self, more: Continue, size: int, count: int, prompts: Iterator[Conversation]
    ) -> list[Draft]:
        # At most `size` conversations are written at once, until they fill `count` sequences.
        drafts, again = (
            list[Draft](),
            list[int](),
        )  # which of the drafts get a second turn in the next round
        begun = fruitless = 0
        while (
            missing := count - sum(1 for _ in pack((draft.tokens for draft in drafts), self.length))
        ) > 0:
            # Conversations that a sequence has taken so far.
            for_one = SPARE if missing == count else begun / (count - missing)
            fresh = max(1, min(size, max(MIN_AT_ONCE, math.ceil(for_one * missing))) - len(again))
            begun += fresh
            given = [Draft(prompt) for prompt in islice(prompts, fresh)]
            opened = given or self._add_message(
                "user", more, [*(drafts[at] for at in again), *([Draft()] * fresh)]
            )
            ended = {index: draft for index, draft in enumerate(opened) if draft}
            answered = dict(
                zip(ended, self._add_message("assistant", more, [*ended.values()]), strict=True)
            )
            for index, at in enumerate(again):
                drafts[at] = answered.pop(index, None) or drafts[at]
            complete = [*filter(None, answered.values())]
            self.dropped += fresh - len(complete)
            fruitless = 0 if complete else fruitless + fresh
            if fruitless >= MAX_FRUITLESS:
                raise UnsupportedModelError(
                    f"{self.source}: none of {fruitless} conversations that the model wrote can be "
                    f"used, as they do "
                    f"not end, repeat themselves, or do not fit {self.length} tokens.",
                    hint=GIVE_TEXT,
                )
            new = range(len(drafts), len(drafts) + len(complete))
            drafts += complete
            again = [at for at in new[::TWO_TURNS] if not given and drafts[at].text is not None]
            again = [at for at in again if self.length - len(drafts[at].tokens) >= MIN_TURN_TOKENS]
        return drafts

    def _add_message(self, role: str, more: Continue, drafts: list[Draft]) -> list[Draft | None]:
        if not drafts:
            return []
        asks, slots = role == "user", [self._slot_for(draft.messages, role) for draft in drafts]
        prompts = [self._prompt(draft, slot) for draft, slot in zip(drafts, slots, strict=True)]
        fits = [0 < len(prompt) < self.length for prompt in prompts]
        room = self.length - min(filter(None, map(len, prompts)), default=self.length)
        if room < MIN_TURN_TOKENS and asks and not drafts[0].messages:
            raise UsageError(
                f"{self.source} does not fit sequences of {self.length} tokens: the chat template "
                f"alone takes "
                f"{self.length - room}.",
                hint="Use a larger --sequence-length.",
            )
        # A template may end a message with an added token of its own.
        ends = self.ends | (set(self._ids(slots[0].ending)[:1]) & self.added.keys())
        forbidden = {token for token, added in self.added.items() if added.special} - ends
        forbidden -= set() if asks else self._allowed_special_tokens()
        begun = [[token for token, _ in prompt] for prompt in compress(prompts, fits)]
        new = max(1, room // 2 if asks else room)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and begun:  # learned positions end there
            new = max(1, min(new, limit - max(map(len, begun))))
        written = iter(more(begun, new, forbidden=forbidden, ends=ends) if begun else [])
        results = list[Draft | None]()
        for draft, prompt, slot, fit in zip(drafts, prompts, slots, fits, strict=True):
            text, spoken, has_ended = (
                self._decode(next(written), ends, slot.ending) if fit else ("", [], False)
            )
            is_whole = has_ended or (
                not asks and len(prompt) + new >= self.length
            )  # its sequence cuts it, no limit
            messages = [*draft.messages, {"role": role, "content": text}]
            if (
                not is_whole
                or not text
                or repetition(text.split()) > MAX_REPETITION
                or (asks and text in self.prompts)
            ):
                results.append(None)
            elif asks:
                self.prompts.add(text)
                results.append(replace(draft, messages=messages))
            else:
                # The template's space behind an answer does not count.
                space = self._ids(slot.after[len(slot.after.rstrip()) :]) if has_ended else []
                tokens = [
                    *prompt,
                    *((token, True) for token in spoken),
                    *((token, False) for token in space),
                ]
                ends_as_shown = self.tokenizer.decode(spoken).endswith(slot.ending)
                results.append(Draft(messages, tokens, slot.shows(text) if ends_as_shown else None))
        return results

    def _prompt(self, draft: Draft, slot: _Slot) -> Tokens:
        # A template that rewrites the text so far leaves nothing to continue.
        if draft.text is None or not slot.prompt.startswith(draft.text):
            return []
        return [
            *draft.tokens,
            *((token, False) for token in self._ids(slot.prompt.removeprefix(draft.text))),
        ]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _decode(
        self, tokens: list[int], ends: set[int], ending: str
    ) -> tuple[str, list[int], bool]:
        # The tokens include an end, by a token or by the template's ending; the text does not.
        has_ended = tokens[-1] in ends
        text = self.tokenizer.decode(tokens[: len(tokens) - has_ended])
        if ending and ending in text:
            text, has_ended = text.partition(ending)[0], True
            tokens = self._ids(text + ending)
        return text.strip(), tokens, has_ended

    def _allowed_special_tokens(self) -> set[int]:
        # An answer may have the special tokens that a template puts around a thought.
        messages = [{"role": "user", "content": MARK}]
        answer = {"role": "assistant", "content": MARK, "reasoning_content": MARK, "thinking": MARK}
        prompt = self._slot_for(messages, "assistant").prompt
        whole = apply_template(self.tokenizer, [*messages, answer], self.source, tokenize=False)
        named = {token for token, added in self.added.items() if "think" in added.content.lower()}
        return named | set(
            self._ids(whole.removeprefix(prompt) if whole.startswith(prompt) else "")
        )

    def _slot_for(self, conversation: Conversation, role: str) -> _Slot:
        messages, asks = [*conversation, {"role": role, "content": MARK}], role == "user"
        template = partial(apply_template, self.tokenizer, source=self.source, tokenize=False)
        before, _, after = template(messages, add_generation_prompt=asks).rpartition(MARK)
        if not before:
            raise UsageError(
                f"The chat template does not show where the words of a {role} begin, so the model "
                f"cannot write "
                f"{self.source}.",
                hint=GIVE_TEXT,
            )
        return _Slot(
            before if asks else template(conversation, add_generation_prompt=True), before, after
        )


class _Slot(NamedTuple):
    """The place of a message's words in a template: the prompt that they continue, and all text
    around them.
    """

    prompt: str
    before: str
    after: str

    @property
    def ending(self) -> str:
        return self.after.strip().partition("\n")[0]

    def shows(self, words: str) -> str | None:
        # None if the template puts something between the prompt and the words.
        return (
            None
            if self.before.removeprefix(self.prompt).strip()
            else f"{self.before}{words}{self.after}"
        )
