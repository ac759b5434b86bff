"""Read text for calibration or evaluation from a local file or a data set on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from sleb_cli.checks.text_names import is_file
from sleb_cli.engine.third_party import first_line
from sleb_cli.names import ANSWERS, local_path
from sleb_cli.records import first_fault, why_not_read
from sleb_cli.units import format_bytes, plural
from sleb_plugins import DataError

T = TypeVar("T")

PARAGRAPHS = "\n\n"
REFERENCE_ROWS = 128
"""The number of rows that the reference implementation draws for calibration."""
C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256

# The title of an article in WikiText: " = Valkyria Chronicles III = ".
_TITLE = re.compile(r"= [^=](.*[^=])? =")

MESSAGES = "messages"
"""The column of a data set that holds conversations."""

# An upper bound: no tokenizer in use has more characters per token, on average over a text.
CHARACTERS_PER_TOKEN = 8

# About how much memory a byte of text takes: it is tokenized as a whole, as bytes, characters and
# tokens at once.
MEMORY_PER_BYTE = 250


Conversation = list[dict[str, Any]]
"""A list of messages, each with a `role` and its `content`."""


@dataclass(frozen=True)
class Dataset:
    """A column of a data set on the Hub whose rows are documents."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    data_files: str | None = None

    def __str__(self) -> str:
        return ":".join(filter(None, (self.path, self.config, self.split, self.column)))


@dataclass(frozen=True)
class Text:
    """A text, or conversations in its place.

    Attributes:
        limit: the number of windows that its protocol takes, from the start.
        split: the split of a data set, if none was named; `source` names it too.
        documents: the offsets in `content` at which documents begin, if it has several.
    """

    source: str
    content: str
    limit: int | None = None
    split: str | None = None
    documents: tuple[int, ...] = ()
    conversations: tuple[Conversation, ...] = ()


@dataclass(frozen=True)
class TextSplit:
    """The part of a source from `begin` to `end`, as shares of it; no document is in two parts that
    do not overlap.
    """

    begin: float = 0.0
    end: float = 1.0

    def rows(self, count: int) -> range:
        """Return this part's rows, out of `count` rows."""
        return range(round(self.begin * count), round(self.end * count))

    def label(self, source: str) -> str:
        """Name this part of a source."""
        return source if self == WHOLE else f"{source} from {self.begin:.0%} to {self.end:.0%}"


WHOLE = TextSplit()

# With fewer documents, a part of a file may end within one.
MIN_DOCUMENTS = 10
# Documents of a data set are divided in this order, whatever the seed that they are drawn by.
SPLIT_SEED = 0

_WIKITEXT2_TRAIN = Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
_C4_TRAIN = Dataset("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")

CALIBRATION_PRESETS = {
    "wikitext2": _WIKITEXT2_TRAIN, "wikitext2-sleb": _WIKITEXT2_TRAIN, "c4": _C4_TRAIN, "c4-sleb": _C4_TRAIN,
}  # fmt: skip
EVALUATION_PRESETS = {
    "wikitext2": replace(_WIKITEXT2_TRAIN, split="test"),
    "c4": replace(_C4_TRAIN, data_files="en/c4-validation.00000-of-00008.json.gz"),
}

EVALUATION_SPLITS = ("test", "validation", "valid", "dev", "val", "eval", "train")
"""The splits of a data set to evaluate on, the best first; calibration takes `train`."""


def calibration_text(source: str, *, tokens: int, seed: int, split: TextSplit = WHOLE) -> Text:
    """Read at least `tokens` tokens of this part of a source, or all of a smaller one.

    `wikitext2` is one running text; documents of `c4` and other data sets are drawn in an order set
    by `seed`.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if is_file(source):
        return _file_text(source, _read_file(source), split)
    dataset = CALIBRATION_PRESETS.get(source) or _parse_dataset(source)
    if source == "wikitext2":
        documents = _documents(dataset, split)
    else:
        documents = _take_characters(
            _documents(dataset, split, shuffle_seed=seed), tokens * CHARACTERS_PER_TOKEN
        )
    return Text(split.label(source), PARAGRAPHS.join(documents))


def reference_calibration_text(
    source: str, *, rows: int, seed: int, split: TextSplit = WHOLE
) -> Text:
    """Read the text that the reference implementation calibrates on: `rows` shuffled rows, joined."""
    separator = PARAGRAPHS if source.startswith("wikitext2") else " "
    return Text(
        source,
        separator.join(
            islice(_documents(CALIBRATION_PRESETS[source], split, shuffle_seed=seed), rows)
        ),
    )


def evaluation_text(source: str, length: int) -> Text:
    """Read the text or the conversations to measure perplexity on; `wikitext2` and `c4` are as in
    the literature.

    For other data sets, read the named split and column (default: the first of EVALUATION_SPLITS,
    and `text` or `messages`), and no more of it than its windows of `length` tokens need.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if source == "wikitext2":  # rows are lines, and an article begins with its title
        lines = _documents(EVALUATION_PRESETS[source])
        return _joined(
            source, lines, begins_document=lambda line: bool(_TITLE.fullmatch(line.strip()))
        )
    if source == "c4":
        documents = islice(_documents(EVALUATION_PRESETS[source]), C4_EVALUATION_DOCUMENTS)
        return replace(_joined(source, documents, " "), limit=C4_EVALUATION_WINDOWS)
    if is_file(source):
        content = _read_file(source)
        conversations = _file_conversations(source, content)
        return (
            Text(source, "", conversations=conversations)
            if conversations
            else _file_text(source, content)
        )
    import datasets

    dataset, split = _parse_dataset(source), None
    path, config, named, column = [*source.split(":"), "", "", ""][:4]
    if not named:
        with _loading(dataset):
            splits = datasets.get_dataset_split_names(dataset.path, dataset.config)
        split = next((name for name in EVALUATION_SPLITS if name in splits), [*splits, "train"][0])
        dataset, source = (
            replace(dataset, split=split),
            f"{path}:{config}:{split}:{column}".rstrip(":"),
        )
    rows = _load(dataset)
    if not column and dataset.column not in rows.column_names and MESSAGES in rows.column_names:
        dataset = replace(dataset, column=MESSAGES)
    values, limit = _values(rows, dataset), C4_EVALUATION_WINDOWS
    first = next(values, "")
    values = chain([first], values)
    if isinstance(first, list):
        return Text(
            source,
            "",
            limit,
            split,
            conversations=tuple(_row_conversations(dataset, values, limit, length)),
        )
    texts = _take_characters(map(str, values), limit * length * CHARACTERS_PER_TOKEN)
    return replace(_joined(source, texts), limit=limit, split=split)


def _joined(
    source: str,
    paragraphs: Iterable[str],
    separator: str = PARAGRAPHS,
    *,
    begins_document: Callable[[str], bool] = bool,
) -> Text:
    paragraphs = list(paragraphs)
    ends = accumulate((len(paragraph) + len(separator) for paragraph in paragraphs), initial=0)
    starts = tuple(
        at for at, paragraph in zip(ends, paragraphs, strict=False) if begins_document(paragraph)
    )
    return Text(source, separator.join(paragraphs), documents=starts if len(starts) > 1 else ())


def calibration_conversations(
    source: str, *, samples: int, length: int, seed: int, split: TextSplit = WHOLE
) -> list[Conversation]:
    """Read conversations of this part of a source: all of a .jsonl file, or enough for the samples
    of a data set.

    They are in the field or column `messages`: lists of {"role": …, "content": …}.

    Raises:
        DataError: the source is missing or unreadable, or holds no or too few conversations.
    """
    if is_file(source):
        conversations = [
            line.conversation for line in _json_lines(source, _read_file(source), _Messages)
        ]
        return _take_split(conversations, split, source, "conversation")
    dataset = _parse_dataset(source, column=MESSAGES)
    values = _values(_load(dataset), dataset, split, shuffle_seed=seed)
    return list(_row_conversations(dataset, values, samples, length))


def _take_split(items: list[T], split: TextSplit, file: str, what: str) -> list[T]:
    if len(items) < (least := 1 if split == WHOLE else MIN_DOCUMENTS):
        raise DataError(
            f"{file} has {plural(len(items), what)}, but needs at least {least}.",
            hint=f"Add more {what}s to it.",
        )
    return [items[row] for row in split.rows(len(items))]


def _row_conversations(
    dataset: Dataset, values: Iterable[Any], count: int, length: int
) -> Iterator[Conversation]:
    # As many as `count` sequences of `length` tokens need: each ends within a conversation, whose
    # rest is dropped.
    longest = length * CHARACTERS_PER_TOKEN
    missing = 2 * count * longest
    for value in values:
        with _naming_faults(f"A row of {dataset}"):
            conversation = _Messages(messages=value).conversation
        yield conversation
        missing -= min(longest, sum(len(message["content"]) for message in conversation))
        if missing <= 0:
            return


def _file_conversations(source: str, content: str) -> tuple[Conversation, ...]:
    # Only of a .jsonl file whose lines have `messages`, and no `text`.
    if Path(source).suffix != ".jsonl":
        return ()
    first = next(filter(None, map(str.strip, content.split("\n"))), "")
    with suppress(ValidationError):  # reading it as text names the fault
        line = TypeAdapter(dict[str, Any]).validate_json(first)
        if line.get("messages") is not None and line.get("text") is None:
            return tuple(line.conversation for line in _json_lines(source, content, _Messages))
    return ()


def read_prompts(source: str, split: TextSplit = WHOLE) -> list[Conversation]:
    """Read the prompts in this part of `answers:FILE`: conversations to be answered.

    The file has a prompt in each line of text, or in the `prompt` or the `messages` of each line of
    JSON.

    Raises:
        DataError: it is missing or unreadable, or has too few prompts.
    """
    file = source.removeprefix(ANSWERS)
    content = _read_file(file or source)
    if Path(file).suffix == ".jsonl":
        prompts = [line.conversation for line in _json_lines(file, content, _Prompt)]
    else:
        prompts = [
            [{"role": "user", "content": line.strip()}]
            for line in content.splitlines()
            if line.strip()
        ]
    return _take_split(prompts, split, file, "prompt")


def is_read_whole(source: str) -> bool:
    """Whether a source is read from its beginning to its end, so that no seed chooses a part of it."""
    return source == "wikitext2" or is_file(source)


def _file_text(source: str, content: str, split: TextSplit = WHOLE) -> Text:
    named, documents = split.label(source), list[str]()
    if Path(source).suffix == ".jsonl":
        documents = [line.text for line in _json_lines(source, content, _Text)]
        if len(documents) >= MIN_DOCUMENTS:
            documents, split = [documents[row] for row in split.rows(len(documents))], WHOLE
        content = PARAGRAPHS.join(documents)
    if not content.strip():
        raise DataError(f"{named} is empty.", hint="Name a file that holds text.")
    if documents and split == WHOLE:
        return _joined(named, documents)
    return Text(named, content[_boundary(content, split.begin) : _boundary(content, split.end)])


def _boundary(content: str, share: float) -> int:
    # Near this share of a running text, between paragraphs, lines or words if one ends there.
    at = round(share * len(content))
    if at in (0, len(content)):
        return at
    for separator in (PARAGRAPHS, "\n", " "):
        end = content.find(separator, at, at + len(content) // 50)
        if end >= 0:
            return end + len(separator)
    return at


def _read_file(source: str) -> str:
    from sleb_cli.engine.device import CPU, free_bytes  # which imports torch

    path = local_path(source)
    try:
        if reason := why_not_read(path):
            hint = (
                "Name a .txt or .jsonl file in it."
                if path.is_dir()
                else "Write its text to a file, and name that."
            )
            raise DataError(f"{source} cannot be read: {reason}.", hint=hint)
        if (size := path.stat().st_size) * MEMORY_PER_BYTE > (free := free_bytes(CPU)):
            raise DataError(
                f"{source} has {format_bytes(size)} of text, but there is memory for only about "
                f"{format_bytes(free / MEMORY_PER_BYTE)}.",
                hint="Name a part of it: `head -c 100M FILE > PART`.",
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {source}.", hint="Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8 text.", hint="Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(
            f"{source} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
        ) from error


class _Text(BaseModel):
    """A line of a .jsonl file."""

    text: str


class _Message(BaseModel, extra="allow"):
    role: str
    content: str


class _Messages(BaseModel):
    """A line of a .jsonl file, or a row of a data set, with --chat."""

    messages: Annotated[list[_Message], Field(min_length=1)]

    @property
    def conversation(self) -> Conversation:
        return [
            message.model_dump(exclude_none=True) for message in self.messages
        ]  # a data set fills in fields


class _Prompt(BaseModel):
    """A line of a .jsonl file of prompts; answers at the end of `messages` are left out."""

    prompt: str | None = None
    messages: list[_Message] = []

    @model_validator(mode="after")
    def _has_a_prompt(self) -> _Prompt:
        if all(message["role"] in ("system", "developer") for message in self.conversation):
            raise ValueError("there is no prompt")
        return self

    @property
    def conversation(self) -> Conversation:
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        messages += [{"role": "user", "content": self.prompt}] if self.prompt else []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages


_Line = TypeVar("_Line", bound=BaseModel)


def _json_lines(source: str, content: str, form: type[_Line]) -> Iterator[_Line]:
    # Not by `splitlines`: strings in JSON may hold other line separators.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            with _naming_faults(f"Line {number} of {source}"):
                parsed = form.model_validate_json(line)
            yield parsed


@contextmanager
def _naming_faults(where: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise DataError(
            f"{where} cannot be read: {first_fault(error, 'JSON')}.",
            hint='Each line needs {"text": "…"}; for answers:FILE, {"prompt": "…"}; for '
            'conversations, {"messages": '
            '[{"role": "…", "content": "…"}]}.',
        ) from error


def _parse_dataset(source: str, column: str = "text") -> Dataset:
    # org/name[:config][:split][:column]
    path, config, split, named = [*source.split(":"), "", "", ""][:4]
    return Dataset(path, config or None, split or "train", named or column)


def _documents(
    dataset: Dataset, split: TextSplit = WHOLE, *, shuffle_seed: int | None = None
) -> Iterator[str]:
    return map(str, _values(_load(dataset), dataset, split, shuffle_seed=shuffle_seed))


def _values(
    rows: Any, dataset: Dataset, split: TextSplit = WHOLE, *, shuffle_seed: int | None = None
) -> Iterator[Any]:
    if dataset.column not in rows.column_names:
        raise DataError(
            f"{dataset} has no column {dataset.column!r}.",
            hint=f"It has {', '.join(rows.column_names)}; choose one with "
            f"org/name:config:split:COLUMN.",
        )
    if split != WHOLE:
        # Rows that are read in order are divided in order, since neighbours may belong to one
        # document.
        ordered = rows if shuffle_seed is None else rows.shuffle(seed=SPLIT_SEED)
        rows = ordered.select(split.rows(len(rows)))
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    return (value for row in rows if (value := row[dataset.column]) is not None)


def _load(dataset: Dataset) -> Any:
    import datasets

    with _loading(dataset):
        return datasets.load_dataset(
            dataset.path, dataset.config, split=dataset.split, data_files=dataset.data_files
        )


def _loading(dataset: Dataset) -> AbstractContextManager[None]:
    hint = "Check the name and the network, or name a local file."
    # An unknown config or split, and a data set that comes as a script.
    return loading_data(f"data set {dataset}", hint, ValueError, RuntimeError)


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


def _take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return
