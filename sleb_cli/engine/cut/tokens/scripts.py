"""The tokens of a vocabulary that stay, by the scripts of their characters."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
from tokenizers.decoders import ByteLevel

from sleb_cli.engine.cut.protocol import Removal
from sleb_cli.engine.files.config_files import map_values
from sleb_cli.results import CutRecord, VocabularyRecord
from sleb_plugins.errors import UnsupportedModelError, UsageError

_ALWAYS = ("common", "inherited")
"""Punctuation, digits, symbols and marks, which belong to no single script.

ASCII letters stay besides.
"""

_NUMBERS = re.compile(r"(.*[._])?token_(ids?|index)|(begin_)?suppress_tokens")
"""Settings that name tokens by number: one, a list, or none."""
_OTHER_NUMBERS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
_SURROGATES = range(0xD800, 0xE000)

INCOMPLETE = "\ufffd"
"""Incomplete characters are decoded to this one."""

_MIN_LOST_SHARE = 0.01
"""Of all tokens; fewer are not worth cutting."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary that stay.

    Attributes:
        scripts: as Unicode names them.
        count: rows of the old embeddings.
        tokens: rows that stay, ascending.
        characters: of these scripts, and the characters that always stay.
    """

    scripts: tuple[str, ...]
    count: int
    tokens: tuple[int, ...]
    characters: str

    @cached_property
    def new_number(self) -> dict[int, int]:
        """The new number of each token that stays."""
        return {old: new for new, old in enumerate(self.tokens)}

    def renumbered(self, numbers: Any) -> Any:
        """Return the new number of a token, or of each in a list; any other value stays."""
        if isinstance(numbers, list):
            return [self.renumbered(number) for number in numbers]
        if type(numbers) is int and 0 <= numbers < self.count:
            return self.new_number[numbers]
        return numbers

    def in_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Renumber the tokens that a file of settings names."""

        def change(key: str, value: Any) -> Any:
            if key == "vocab_size" and value == self.count:
                return len(self.tokens)
            return self.renumbered(value) if _NUMBERS.fullmatch(key) else value

        return map_values(settings, change)


@dataclass(frozen=True)
class TokenRemoval(Removal):
    """The removal of the tokens that are not in a vocabulary."""

    vocabulary: Vocabulary

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that stay."""
        return self.vocabulary.tokens

    @property
    def name_parts(self) -> tuple[str, ...]:
        """The scripts that stay."""
        return self.vocabulary.scripts

    def record(self, sizes: Mapping[str, tuple[int, int]]) -> Mapping[str, CutRecord]:
        """Return the scripts, and the numbers of tokens and the sizes before and after."""
        tokens = (self.vocabulary.count, len(self.tokens))
        return {
            "vocabulary": VocabularyRecord(scripts=self.vocabulary.scripts, tokens=tokens, **sizes)
        }


def characters_of(scripts: Iterable[str], normalize: Callable[[str], str] = str) -> str:
    """Return all characters of these scripts, and the characters that always stay."""
    classes = []
    for script in (*_ALWAYS, *scripts):
        try:
            if not script.replace("_", "").isalpha():
                raise regex.error("no name")
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error as error:
            raise UsageError(
                f"Unicode has no script {script!r}.",
                hint="For example: --scripts latin,greek,cyrillic.",
            ) from error
        classes.append(rf"\p{{Script={script}}}")
    numbers = (*range(_SURROGATES.start), *range(_SURROGATES.stop, sys.maxunicode + 1))
    everything = "".join(map(chr, numbers))
    matching = set(regex.findall(rf"[\p{{ASCII}}{''.join(classes)}]", everything))
    # Without characters that the tokenizer would first turn into another script: NFKC makes a Greek
    # letter of the micro sign.
    characters = [character for character in matching if matching.issuperset(normalize(character))]
    return "".join(sorted(characters))


def text_of(token: str, *, in_bytes: bool) -> str:
    """Return the text of a token, which may be spelled in bytes.

    Incomplete characters become `INCOMPLETE`.
    """
    return ByteLevel().decode([token]) if in_bytes else token


def token_ids_in(settings: Mapping[str, Any], where: str) -> set[int]:
    """Return the tokens that a file of settings names by number."""
    numbers: set[int] = set()

    def note(key: str, value: Any) -> None:
        if key in _OTHER_NUMBERS and value:
            raise UnsupportedModelError(
                f"{key} in {where} names tokens in a way that sleb cannot renumber.",
                hint="Leave out --scripts, or delete that setting from a copy of the model.",
            )
        if _NUMBERS.fullmatch(key):
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int:
                    numbers.add(number)

    map_values(settings, note)
    return numbers


def choose_tokens(
    scripts: Sequence[str],
    texts: Mapping[int, str],
    always: Iterable[int],
    count: int,
    normalize: Callable[[str], str] = str,
) -> Vocabulary:
    """Choose the tokens whose texts are of these scripts, and the tokens in `always`."""
    # A text of these scripts gets the same tokens as before: every token that it can be merged from
    # is a part of it, and so stays, as characters of these scripts or as bytes of an incomplete
    # one.
    characters = characters_of(scripts, normalize)
    staying = {INCOMPLETE, *characters, *normalize(characters)}
    tokens = {number for number, text in texts.items() if staying.issuperset(text)}
    tokens |= {number for number in always if 0 <= number < count}
    lost = count - len(tokens)
    if lost < _MIN_LOST_SHARE * count:
        raise UsageError(
            f"Nothing is gained: {lost:,} of {count:,} tokens are of other scripts than "
            f"{', '.join(scripts)}.",
            hint="Leave out --scripts.",
        )
    return Vocabulary(tuple(scripts), count, tuple(sorted(tokens)), characters)


def cannot_cut(model: str, why: str) -> UnsupportedModelError:
    """Return the error for a vocabulary of a kind that sleb cannot cut."""
    return UnsupportedModelError(
        f"Cannot cut the vocabulary of {model}, because {why}.", hint="Leave out --scripts."
    )
