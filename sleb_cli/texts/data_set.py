"""Data sets on the Hub, among them the presets of the literature and of the reference."""

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
    Draw,
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


WIKITEXT2 = Column("Salesforce/wikitext", "wikitext-2-raw-v1")
C4 = Column("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
C4_VALIDATION = replace(C4, data_files="en/c4-validation.00000-of-00008.json.gz")


class WikiText2(TextSource):
    """WikiText-2, one running text whose rows are lines."""

    is_endless = False

    def read(self, draw: Draw) -> Text:
        """Read all of this part."""
        lines = read_documents(WIKITEXT2, draw.split)
        return Text(draw.split.label(self.name), PARAGRAPHS.join(lines))

    def read_for_evaluation(self, length: int) -> Text:
        """Read the test text as in the literature; an article begins with its title."""
        lines = list(read_documents(replace(WIKITEXT2, split="test")))
        return join_documents(self.name, lines, begins_document=_is_title)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return replace(WIKITEXT2, split="test" if evaluated else "train").origin


class WebPages(TextSource):
    """C4: web pages."""

    def read(self, draw: Draw) -> Text:
        """Read documents of this part until there are enough."""
        return _draw_documents(self.name, C4, draw)

    def read_for_evaluation(self, length: int) -> Text:
        """Read the first documents for validation, as in the literature."""
        documents = list(islice(read_documents(C4_VALIDATION), C4_EVALUATION_DOCUMENTS))
        return replace(join_documents(self.name, documents, " "), limit=MAX_EVALUATION_WINDOWS)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return (C4_VALIDATION if evaluated else C4).origin


class ReferenceText(TextSource):
    """The text that the reference implementation calibrates on: shuffled rows, joined."""

    is_reference = True

    def __init__(self, name: str, column: Column, separator: str) -> None:
        super().__init__(name)
        self.column = column
        self.separator = separator

    @property
    def in_windows(self) -> str:
        """The name of the same text, cut into windows."""
        return self.name.removesuffix("-sleb")

    def read(self, draw: Draw) -> Text:
        """Read as many rows as samples."""
        rows = islice(read_documents(self.column, draw.split, draw.seed), draw.samples)
        return Text(self.name, self.separator.join(rows))

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return self.column.origin


class DataSet(TextSource):
    """`org/name[:config][:split][:column]`."""

    holds_conversations = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        path, *parts = name.split(":")
        self.is_well_formed = "/" in path and len(parts) <= 3
        config, self.split, self.column = [*parts, "", "", ""][:3]
        self.text = Column(path, config or None, self.split or "train", self.column or "text")

    @property
    def is_conversations(self) -> bool:
        """Whether it has a column `messages` and no `text`, and no column is named."""
        return not self.column and _has_messages_alone(load(self.text))

    def read(self, draw: Draw) -> Text:
        """Read documents or conversations of this part until there are enough."""
        if not draw.chat:
            return _draw_documents(self.name, self.text, draw)
        column = replace(self.text, column=self.column or MESSAGES)
        values = read_column(load(column), column, draw.split, draw.seed)
        return Text(self.name, "", conversations=_take_conversations(column, values, draw))

    def read_for_evaluation(self, length: int) -> Text:
        """Read the named split and column, and no more of it than its windows need.

        By default, read the first of EVALUATION_SPLITS, and the column `text` or `messages`.
        """
        name = self.name
        split = None
        column = self.text
        if not self.split:
            split = _evaluation_split(column)
            column = replace(column, split=split)
            name = f"{column.path}:{column.config or ''}:{split}:{self.column}".rstrip(":")
        rows = load(column)
        if not self.column and _has_messages_alone(rows):
            column = replace(column, column=MESSAGES)
        values = read_column(rows, column)
        limit = MAX_EVALUATION_WINDOWS
        first = next(values, "")
        values = chain([first], values)
        if isinstance(first, list):
            talks = _take_conversations(column, values, Draw(limit, length))
            return Text(name, "", limit, split, conversations=talks)
        documents = take_characters(map(str, values), limit * length * CHARACTERS_PER_TOKEN)
        return replace(join_documents(name, list(documents)), limit=limit, split=split)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the data set with its config and split."""
        return self.text.origin


def _has_messages_alone(rows: Any) -> bool:
    return MESSAGES in rows.column_names and "text" not in rows.column_names


def _is_title(line: str) -> bool:
    return _TITLE.fullmatch(line.strip()) is not None


def _evaluation_split(column: Column) -> str:
    import datasets

    with _loading(column):
        splits: list[str] = datasets.get_dataset_split_names(column.path, column.config)
    for split in (*EVALUATION_SPLITS, *splits):
        if split in splits:
            return split
    return "train"


def _draw_documents(name: str, column: Column, draw: Draw) -> Text:
    documents = read_documents(column, draw.split, draw.seed)
    enough = take_characters(documents, draw.samples * draw.length * CHARACTERS_PER_TOKEN)
    return Text(draw.split.label(name), PARAGRAPHS.join(enough))


def _take_conversations(
    column: Column, values: Iterable[Any], draw: Draw
) -> tuple[Conversation, ...]:
    # Each sequence ends within a conversation, whose rest is dropped.
    longest = draw.length * CHARACTERS_PER_TOKEN
    missing = 2 * draw.samples * longest
    taken = []
    for value in values:
        with naming_faults(f"A row of {column}"):
            taken.append(Messages(messages=value).conversation)
        missing -= min(longest, sum(len(message["content"]) for message in taken[-1]))
        if missing <= 0:
            break
    return tuple(taken)


def read_documents(
    column: Column, split: TextSplit = WHOLE, shuffle_seed: int | None = None
) -> Iterator[str]:
    """Read the documents of this part of a data set, in its order or in that of a seed."""
    return map(str, read_column(load(column), column, split, shuffle_seed))


def read_column(
    rows: Any, column: Column, split: TextSplit = WHOLE, shuffle_seed: int | None = None
) -> Iterator[Any]:
    """Return the values of the column in order, or in the order of a seed."""
    if column.column not in rows.column_names:
        raise DataError(
            f"{column} has no column {column.column!r}.",
            hint=f"It has {', '.join(rows.column_names)}; choose one with "
            f"org/name:config:split:COLUMN.",
        )
    if split != WHOLE:
        # Rows that are read in order are divided in order: neighbours may belong to one document.
        ordered = rows if shuffle_seed is None else rows.shuffle(seed=SPLIT_SEED)
        rows = ordered.select(split.rows(len(rows)))
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    values = (row[column.column] for row in rows)
    return (value for value in values if value is not None)


def load(column: Column) -> Any:
    """Load the data set of a column."""
    import datasets

    with _loading(column):
        return datasets.load_dataset(
            column.path, column.config, split=column.split, data_files=column.data_files
        )


def _loading(column: Column) -> AbstractContextManager[None]:
    hint = (
        "Check the name and the network, or name a local file. `sleb eval --tasks canaries` and "
        "`sleb search --calibration self` need no network."
    )
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
