"""Where text comes from: a local file, or a data set of the hub, for calibration or for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.engine.foreign import first_line
from sleb_plugins import DataError

PARAGRAPHS = "\n\n"
REFERENCE_ROWS = 128
"""Rows that the reference implementation draws for calibration."""
C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256

# No tokenizer in use spends more characters on a token, on average over a text.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Dataset:
    """Where on the hub the documents of a text are."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    data_files: str | None = None

    def __str__(self) -> str:
        return ":".join(part for part in (self.path, self.config, self.split, self.column) if part)


@dataclass(frozen=True)
class Text:
    """A text and where it is from. `limit` is the most windows that its protocol takes, from the start."""

    source: str
    content: str
    limit: int | None = None


WIKITEXT2_TRAIN = Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
WIKITEXT2_TEST = Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
C4_TRAIN = Dataset("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
C4_VALIDATION = Dataset("allenai/c4", split="train", data_files="en/c4-validation.00000-of-00008.json.gz")


def calibration_text(source: str, *, tokens: int, seed: int) -> Text:
    """Give a text of at least `tokens` tokens where the source has as many.

    `wikitext2` is one running text; of `c4` and other data sets, documents are drawn in an order set by
    `seed` until there is enough.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    characters = tokens * CHARACTERS_PER_TOKEN
    if source == "wikitext2":
        return Text(source, PARAGRAPHS.join(_documents(WIKITEXT2_TRAIN)))
    if source == "c4":
        return Text(source, PARAGRAPHS.join(_enough(_documents(C4_TRAIN, shuffle_seed=seed), characters)))
    if _is_file(source):
        return _file_text(source)
    dataset = _parse_dataset(source)
    return Text(source, PARAGRAPHS.join(_enough(_documents(dataset, shuffle_seed=seed), characters)))


def reference_calibration_text(source: str, *, rows: int, seed: int) -> Text:
    """Give the text that the reference implementation calibrates on: `rows` shuffled rows, joined.

    Raises:
        DataError: the data set cannot be loaded.
    """
    dataset, separator = (WIKITEXT2_TRAIN, PARAGRAPHS) if source.startswith("wikitext2") else (C4_TRAIN, " ")
    return Text(source, separator.join(_first(_documents(dataset, shuffle_seed=seed), rows)))


def evaluation_text(source: str) -> Text:
    """Give the text to measure perplexity on, as the literature does for `wikitext2` and `c4`.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """
    if source == "wikitext2":
        return Text(source, PARAGRAPHS.join(_documents(WIKITEXT2_TEST)))
    if source == "c4":
        documents = _first(_documents(C4_VALIDATION), C4_EVALUATION_DOCUMENTS)
        return Text(source, " ".join(documents), C4_EVALUATION_WINDOWS)
    if _is_file(source):
        return _file_text(source)
    return Text(source, PARAGRAPHS.join(_documents(_parse_dataset(source))), C4_EVALUATION_WINDOWS)


def _is_file(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.suffix in {".txt", ".jsonl", ".md", ".json"} or source.startswith((".", "/", "~"))


def _file_text(source: str) -> Text:
    path = Path(source).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {source}.", hint="Check the path.") from error
    except IsADirectoryError as error:
        raise DataError(f"{source} is a folder.", hint="Name a .txt or .jsonl file in it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text.", hint="Convert it, for example with iconv.") from error
    except PermissionError as error:
        raise DataError(f"You may not read {source}.", hint="Change its permissions.") from error
    if path.suffix == ".jsonl":
        content = PARAGRAPHS.join(_json_lines(source, content))
    if not content.strip():
        raise DataError(f"{source} is empty.", hint="Name a file that holds text.")
    return Text(source, content)


def _json_lines(source: str, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'Line {number} of {source} is not an object with a field "text".',
                hint='A .jsonl file holds one {"text": "…"} a line.',
            ) from error
        if not isinstance(text, str):
            raise DataError(f'The field "text" in line {number} of {source} is not a string.', hint="Correct it.")
        yield text


def _parse_dataset(source: str) -> Dataset:
    """Read org/name[:config][:split][:column]."""
    path, *parts = source.split(":")
    if "/" not in path or len(parts) > 3:
        raise DataError(
            f"There is no text source {source!r}.",
            hint="Use wikitext2, c4, self, a .txt or .jsonl file, or org/name[:config][:split][:column].",
        )
    config, split, column = [*parts, "", "", ""][:3]
    return Dataset(path, config or None, split or "train", column or "text")


def _documents(dataset: Dataset, *, shuffle_seed: int | None = None) -> Iterator[str]:
    """Load a data set of the hub and give its documents."""
    rows = _load(dataset)
    if dataset.column not in rows.column_names:
        raise DataError(
            f"{dataset} has no column {dataset.column!r}.",
            hint=f"It has {', '.join(rows.column_names)}; name one as org/name:config:split:COLUMN.",
        )
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    return (str(row[dataset.column]) for row in rows)


def _load(dataset: Dataset) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset.path, dataset.config, split=dataset.split, data_files=dataset.data_files)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataError(
            f"The data set {dataset} cannot be loaded: {first_line(error)}.",
            hint="Check the name and the network, or calibrate on a file or on `self`.",
        ) from error
    except ValueError as error:  # how datasets refuses an unknown config or split
        raise DataError(
            f"The data set {dataset} cannot be loaded: {first_line(error)}.", hint="Check the name."
        ) from error


def _enough(documents: Iterable[str], characters: int) -> Iterator[str]:
    found = 0
    for document in documents:
        yield document
        found += len(document)
        if found >= characters:
            return


def _first(documents: Iterable[str], count: int) -> Iterator[str]:
    for _, document in zip(range(count), documents, strict=False):
        yield document
