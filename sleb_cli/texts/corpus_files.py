"""Corpora to measure models on that only read: texts, pairs, labelled texts, and BEIR's folders."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleb_cli.names import local_path
from sleb_cli.texts.local_file import read_file
from sleb_cli.texts.messages import CorpusEntry, CorpusLine, Label, parse_lines
from sleb_plugins import DataError

DOCUMENTS = "corpus.jsonl"


@dataclass(frozen=True)
class Corpus:
    """Texts, and what is known of them.

    Attributes:
        queries: what is asked of the texts; if there are none, the texts ask each other.
        gains: for each query, how relevant each judged text is, by its number.
        own: for each query, the text of the same id, if any, which does not answer it.
        items: the texts or pairs in their order, for models that classify them.
        labels: the class of each item, where it is known.
        left_out: how many queries there are besides, none of whose texts is judged.
    """

    texts: Sequence[str]
    queries: Sequence[str] = ()
    gains: Sequence[Mapping[int, float]] = ()
    own: Sequence[int | None] = ()
    items: Sequence[str | tuple[str, str]] = ()
    labels: Sequence[Label | None] = ()
    left_out: int = 0


def require_corpus(name: str) -> None:
    """Raise a DataError unless there is such a file, or such a folder in BEIR's form."""
    path = local_path(name)
    if not path.exists():
        raise DataError(f"There is no file or folder {name}.", hint="Check --corpus.")
    if path.is_dir() and not (path / DOCUMENTS).is_file():
        raise DataError(
            f"{name} has no {DOCUMENTS}.",
            hint=f"A folder in BEIR's form has {DOCUMENTS}, queries.jsonl and qrels/test.tsv.",
        )


def read_lines(name: str) -> Corpus:
    """Read a .jsonl file of texts or of pairs; a pair without a number is relevant.

    Raises:
        DataError: it cannot be read.
    """
    items: list[str | tuple[str, str]] = []
    labels = []
    texts: dict[str, int] = {}
    queries: dict[str, dict[int, float]] = {}
    for line in parse_lines(name, read_file(name), CorpusLine):
        labels.append(line.label)
        number = texts.setdefault(line.text, len(texts))
        if line.query is None:
            items.append(line.text)
            continue
        items.append((line.query, line.text))
        gain = 1.0 if line.label is None or isinstance(line.label, str) else line.label
        queries.setdefault(line.query, {})[number] = gain
    gains = list(queries.values())
    return Corpus(list(texts), list(queries), gains, [None] * len(gains), items, labels)


def read_folder(name: str) -> Corpus:
    """Read a folder in BEIR's form; of several files of judgements, the one that is named test.

    Raises:
        DataError: a file cannot be read, or judges nothing.
    """
    folder = local_path(name)
    texts: list[str] = []
    numbers: dict[str, int] = {}
    for entry in _read_entries(folder / DOCUMENTS):
        numbers[entry.id] = len(texts)
        texts.append(f"{entry.title or ''} {entry.text}".strip())
    queries = {entry.id: entry.text for entry in _read_entries(folder / "queries.jsonl")}
    gains: dict[str, dict[int, float]] = {query: {} for query in queries}
    files = sorted(folder.glob("qrels/*.tsv"), key=lambda file: file.stem != "test")
    for file in files[:1]:
        for query, text, gain in _read_judgements(file):
            if query in gains and text in numbers:
                gains[query][numbers[text]] = gain
    judged = [query for query in queries if gains[query] or not files]
    if files and not judged:
        raise DataError(
            f"No query of {name} has a judged text.",
            hint=f"The ids in qrels/*.tsv must be those of queries.jsonl and {DOCUMENTS}.",
        )
    return Corpus(
        texts,
        [queries[query] for query in judged],
        [gains[query] for query in judged],
        [numbers.get(query) for query in judged],
        texts,
        left_out=len(queries) - len(judged),
    )


def _read_entries(file: Path) -> list[CorpusEntry]:
    return parse_lines(str(file), read_file(str(file)), CorpusEntry)


def _read_judgements(file: Path) -> list[tuple[str, str, float]]:
    """Read the query, the text and the grade in each line of a file, as in BEIR or of trec_eval."""
    judgements = []
    for number, line in enumerate(read_file(str(file)).splitlines(), start=1):
        fields = line.rstrip().split("\t")
        if len(fields) == 1:
            fields = line.split()
        if len(fields) == 4:
            del fields[1]  # trec_eval's iteration, which says nothing
        if len(fields) == 3 and _is_number(fields[2]):
            query, text, gain = fields
            judgements.append((query, text, float(gain)))
            continue
        names_columns = number == 1 and len(fields) == 3
        if fields and not names_columns:
            raise DataError(
                f"Line {number} of {file} is not a query, a text and a number.",
                hint="Separate them by tabs: query-id, corpus-id, score.",
            )
    return judgements


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
