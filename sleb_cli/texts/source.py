"""What every kind of text has in common."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

PARAGRAPHS = "\n\n"

# An upper bound: no tokenizer in use has more characters per token, on average over a text.
CHARACTERS_PER_TOKEN = 8

Conversation = list[dict[str, Any]]
"""A list of messages, each with a `role` and its `content`."""


@dataclass(frozen=True)
class Row:
    """A line of a file that holds a text, and the query that is asked of it in a pair."""

    text: str
    query: str | None = None


@dataclass(frozen=True)
class Text:
    """A text, or conversations in its place.

    Attributes:
        limit: the number of windows that its protocol takes, from the start.
        split: the split of a data set, if none was named; `source` names it too.
        documents: the offsets in `content` at which documents begin, if it has several.
        rows: the lines of a file that holds a text in each.
    """

    source: str
    content: str
    limit: int | None = None
    split: str | None = None
    documents: tuple[int, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class TextSplit:
    """The part of a source from `begin` to `end`, as shares of it.

    No document is in two parts that do not overlap.
    """

    begin: float = 0.0
    end: float = 1.0

    def rows(self, count: int) -> range:
        """Return this part's rows, out of `count` rows."""
        return range(round(self.begin * count), round(self.end * count))

    def label(self, source: str) -> str:
        """Name this part of a source."""
        if self == WHOLE:
            return source
        return f"{source} from {self.begin:.0%} to {self.end:.0%}"


WHOLE = TextSplit()


@dataclass(frozen=True)
class Draw:
    """Which part of a source to read, at least `samples` sequences of `length` tokens of it.

    `seed` orders what has no order of its own. With `chat`, conversations are read from sources
    that hold some.
    """

    samples: int
    length: int
    seed: int = 0
    split: TextSplit = WHOLE
    chat: bool = False


class TextSource:
    """A kind of text, by the name that the user gives it; `named.py` lists the kinds.

    Attributes:
        is_written: whether the model writes it.
        is_reference: whether it is drawn as in the reference implementation, where the number of
            samples counts rows of text, not sequences.
        is_endless: whether another seed draws other text; the others are read from start to end.
        holds_conversations: whether it can be read as conversations.
        has_prompts: whether the model answers `prompts` that are given.
    """

    is_written = False
    is_reference = False
    is_endless = True
    holds_conversations = False
    has_prompts = False

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def in_windows(self) -> str:
        """The name of the same text, cut into windows."""
        return self.name

    @property
    def is_conversations(self) -> bool:
        """Whether it can be read as conversations alone.

        Raises:
            DataError: it is missing or unreadable.
        """
        return False

    def require(self) -> None:
        """Raise a DataError unless it is there, as far as that is known without reading it."""

    def read(self, draw: Draw) -> Text:
        """Read text to calibrate on, or all of a smaller one.

        Raises:
            DataError: it is missing, unreadable or empty.
        """
        raise NotImplementedError

    def read_for_evaluation(self, length: int) -> Text:
        """Read the text, or the conversations, to measure perplexity on in windows of `length`.

        Raises:
            DataError: it is missing, unreadable or empty.
        """
        raise NotImplementedError

    def prompts(self, split: TextSplit = WHOLE) -> list[Conversation]:
        """Read the prompts in this part that the model is to answer, each a conversation.

        Raises:
            DataError: they are missing or unreadable, or too few.
        """
        return []

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the file, or the data set with config and split, to calibrate or evaluate on."""
        return self.name, "", ""


def join_documents(
    source: str,
    pieces: list[str],
    separator: str = PARAGRAPHS,
    begins_document: Callable[[str], bool] = bool,
) -> Text:
    """Join pieces of text, and note which begin a document: by default, all but empty ones."""
    starts = []
    at = 0
    for piece in pieces:
        if begins_document(piece):
            starts.append(at)
        at += len(piece) + len(separator)
    if len(starts) < 2:
        starts = []
    return Text(source, separator.join(pieces), documents=tuple(starts))


def take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield documents until they have so many characters."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return
