"""Data sets on the Hub, among them the presets of the literature and of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from sleb_cli.names import local_path
from sleb_cli.texts.messages import Messages, naming_faults
from sleb_cli.texts.source import (
    CHARACTERS_PER_TOKEN,
    PARAGRAPHS,
    WHOLE,
    Conversation,
    Text,
    TextSource,
    TextSplit,
    join_documents,
    take_characters,
)
from sleb_plugins import DataError
from sleb_plugins.errors import first_line

REFERENCE_ROWS = 128
"""The number of rows that the reference implementation draws for calibration."""
C4_EVALUATION_DOCUMENTS = 1100
MAX_EVALUATION_WINDOWS = 256

MESSAGES = "messages"
"""The column of a data set that holds conversations."""

EVALUATION_SPLITS = ("test", "validation", "valid", "dev", "val", "eval", "train")
"""The splits of a data set to evaluate on, the best first; calibration takes `train`."""

# Documents of a data set are divided in this order, whatever the seed that they are drawn by.
SPLIT_SEED = 0

# The title of an article in WikiText: " = Valkyria Chronicles III = ".
_TITLE = re.compile(r"= [^=](.*[^=])? =")


@dataclass(frozen=True)
class Column:
    """A column of a data set on the Hub, whose rows are documents or conversations."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    data_files: str | None = None

    def __str__(self) -> str:
        return ":".join(filter(None, (self.path, self.config, self.split, self.column)))

    @property
    def origin(self) -> tuple[str, str, str]:
        """The data set with its config and split."""
        if self.data_files:  # "en/c4-validation.00000-of-00008.json.gz"
            config, file = self.data_files.split("/")
            return self.path, config, file.removeprefix("c4-").partition(".")[0]
        folder = local_path(self.path)
        path = str(folder.resolve()) if folder.exists() else self.path
        return path, self.config or "", self.split


WIKITEXT2_TRAIN = Column("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
WIKITEXT2_TEST = replace(WIKITEXT2_TRAIN, split="test")
C4_TRAIN = Column("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
C4_VALIDATION = replace(C4_TRAIN, data_files="en/c4-validation.00000-of-00008.json.gz")


class DataSet(TextSource):
    """`org/name[:config][:split][:column]`, whose documents are drawn in an order of the seed."""

    holds_conversations = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        path, *parts = name.split(":")
        self.is_well_formed = "/" in path and len(parts) <= 3
        self.path = path
        self.config, self.split, self.column = [*parts, "", "", ""][:3]

    def text(self, *, tokens: int, seed: int, split: TextSplit = WHOLE) -> Text:
        """Read documents of this part until there are enough."""
        documents = read_documents(self._column("text"), split, seed)
        enough = take_characters(documents, tokens * CHARACTERS_PER_TOKEN)
        return Text(split.label(self.name), PARAGRAPHS.join(enough))

    def conversations(
        self, *, samples: int, length: int, seed: int, split: TextSplit = WHOLE
    ) -> list[Conversation]:
        """Read conversations of this part until there are enough."""
        column = self._column(MESSAGES)
        rows = divide(load(column), column, split, seed)
        return list(_parse_conversations(column, values_of(rows, column), samples, length))

    def evaluation_text(self, length: int) -> Text:
        """Read the named split and column, and no more of it than its windows need.

        By default, read the first of EVALUATION_SPLITS, and the column `text` or `messages`.
        """
        name, split, column = self.name, None, self._column("text")
        if not self.split:
            split = _evaluation_split(column)
            column = replace(column, split=split)
            name = f"{self.path}:{self.config}:{split}:{self.column}".rstrip(":")
        rows = load(column)
        if not self.column and "text" not in rows.column_names and MESSAGES in rows.column_names:
            column = replace(column, column=MESSAGES)
        values = values_of(divide(rows, column), column)
        limit = MAX_EVALUATION_WINDOWS
        first = next(values, "")
        values = chain([first], values)
        if isinstance(first, list):
            conversations = tuple(_parse_conversations(column, values, limit, length))
            return Text(name, "", limit, split, conversations=conversations)
        documents = take_characters(map(str, values), limit * length * CHARACTERS_PER_TOKEN)
        return replace(join_documents(name, documents), limit=limit, split=split)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return self._column("text").origin

    def _column(self, default: str) -> Column:
        return Column(self.path, self.config or None, self.split or "train", self.column or default)


class WikiText2(TextSource):
    """WikiText-2, one running text whose rows are lines."""

    is_endless = False

    def text(self, *, tokens: int, seed: int, split: TextSplit = WHOLE) -> Text:
        """Read all of this part."""
        return Text(split.label(self.name), PARAGRAPHS.join(read_documents(WIKITEXT2_TRAIN, split)))

    def evaluation_text(self, length: int) -> Text:
        """Read the text as in the literature; an article begins with its title."""
        lines = read_documents(WIKITEXT2_TEST)
        return join_documents(self.name, lines, begins_document=_is_title)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return WIKITEXT2_TEST.origin if evaluated else WIKITEXT2_TRAIN.origin


class C4(TextSource):
    """Web pages of C4."""

    def text(self, *, tokens: int, seed: int, split: TextSplit = WHOLE) -> Text:
        """Read documents of this part until there are enough."""
        documents = read_documents(C4_TRAIN, split, seed)
        enough = take_characters(documents, tokens * CHARACTERS_PER_TOKEN)
        return Text(split.label(self.name), PARAGRAPHS.join(enough))

    def evaluation_text(self, length: int) -> Text:
        """Read the first documents for validation, as in the literature."""
        documents = islice(read_documents(C4_VALIDATION), C4_EVALUATION_DOCUMENTS)
        return replace(join_documents(self.name, documents, " "), limit=MAX_EVALUATION_WINDOWS)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return C4_VALIDATION.origin if evaluated else C4_TRAIN.origin


class ReferenceText(TextSource):
    """The text that the reference implementation calibrates on: shuffled rows, joined."""

    is_reference = True

    def __init__(self, name: str, column: Column, separator: str) -> None:
        super().__init__(name)
        self.column, self.separator = column, separator

    @property
    def in_windows(self) -> str:
        """The name of the same text, cut into windows."""
        return self.name.removesuffix("-sleb")

    def text_of_rows(self, rows: int, seed: int, split: TextSplit = WHOLE) -> Text:
        """Read so many rows."""
        documents = islice(read_documents(self.column, split, seed), rows)
        return Text(self.name, self.separator.join(documents))

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return self.column.origin


def _is_title(line: str) -> bool:
    return _TITLE.fullmatch(line.strip()) is not None


def _evaluation_split(column: Column) -> str:
    import datasets

    with _loading(column):
        splits = datasets.get_dataset_split_names(column.path, column.config)
    for split in EVALUATION_SPLITS:
        if split in splits:
            return split
    return splits[0] if splits else "train"


def _parse_conversations(
    column: Column, values: Iterable[Any], count: int, length: int
) -> Iterator[Conversation]:
    # As many as `count` sequences of `length` tokens need: each ends within a conversation, whose
    # rest is dropped.
    longest = length * CHARACTERS_PER_TOKEN
    missing = 2 * count * longest
    for value in values:
        with naming_faults(f"A row of {column}"):
            conversation = Messages(messages=value).conversation
        yield conversation
        missing -= min(longest, sum(len(message["content"]) for message in conversation))
        if missing <= 0:
            return


def read_documents(
    column: Column, split: TextSplit = WHOLE, shuffle_seed: int | None = None
) -> Iterator[str]:
    """Read the documents of this part of a data set, in its order or in that of a seed."""
    return map(str, values_of(divide(load(column), column, split, shuffle_seed), column))


def divide(
    rows: Any, column: Column, split: TextSplit = WHOLE, shuffle_seed: int | None = None
) -> Any:
    """Return the rows of this part of a data set, in its order or in that of a seed."""
    if column.column not in rows.column_names:
        raise DataError(
            f"{column} has no column {column.column!r}.",
            hint=f"It has {', '.join(rows.column_names)}; choose one with "
            f"org/name:config:split:COLUMN.",
        )
    if shuffle_seed is None:
        # Neighbours may belong to one document.
        return rows if split == WHOLE else rows.select(split.rows(len(rows)))
    if split != WHOLE:
        rows = rows.shuffle(seed=SPLIT_SEED).select(split.rows(len(rows)))
    return rows.shuffle(seed=shuffle_seed)


def values_of(rows: Any, column: Column) -> Iterator[Any]:
    """Yield what stands in the column, where something does."""
    for row in rows:
        value = row[column.column]
        if value is not None:
            yield value


def load(column: Column) -> Any:
    """Load the data set of a column."""
    import datasets

    with _loading(column):
        return datasets.load_dataset(
            column.path, column.config, split=column.split, data_files=column.data_files
        )


def _loading(column: Column) -> AbstractContextManager[None]:
    hint = "Check the name and the network, or name a local file."
    # An unknown config or split, and a data set that comes as a script.
    return loading_data(f"data set {column}", hint, ValueError, RuntimeError)


@contextmanager
def loading_data(what: str, hint: str, *others: type[Exception]) -> Iterator[None]:
    """Turn errors of the library `datasets`, and these others, into a `DataError` about `what`."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        yield
    except (ConnectionError, FileNotFoundError, DatasetsError, *others) as error:
        raise DataError(f"The {what} cannot be loaded: {first_line(error)}.", hint=hint) from error
