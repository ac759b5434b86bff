"""Texts in local files: running text, or lines of JSON."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sleb_cli.names import local_path, names_beside
from sleb_cli.records import why_not_read
from sleb_cli.texts.messages import Messages, TextLine, begins_with_messages, parse_lines
from sleb_cli.texts.source import (
    PARAGRAPHS,
    WHOLE,
    Draw,
    Row,
    Text,
    TextSource,
    TextSplit,
    join_documents,
)
from sleb_cli.units import plural
from sleb_plugins import DataError
from sleb_plugins.errors import did_you_mean

T = TypeVar("T")

SUFFIXES = frozenset({".txt", ".jsonl", ".md", ".json"})

# With fewer documents, a part of a file may end within one.
MIN_DOCUMENTS = 10


class LocalFile(TextSource):
    """A file of text; a .jsonl file has a document or a conversation in each line."""

    is_endless = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.has_lines = Path(name).suffix == ".jsonl"
        self.holds_conversations = self.has_lines

    @property
    def is_conversations(self) -> bool:
        """Whether its first line has `messages` and no `text`."""
        return self.has_lines and begins_with_messages(read_file(self.name))

    def require(self) -> None:
        """Raise a DataError unless there is such a file."""
        require_file(self.name)

    def read(self, draw: Draw) -> Text:
        """Read this part of the file, whatever the draw needs of it."""
        content = read_file(self.name)
        if draw.chat and self.holds_conversations:
            return self._conversations(content, draw.split)
        return self._text(content, draw.split)

    def read_for_evaluation(self, length: int) -> Text:
        """Read all of the file."""
        content = read_file(self.name)
        if self.is_conversations:
            return self._conversations(content, WHOLE)
        return self._text(content, WHOLE)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the path of the file."""
        path = local_path(self.name)
        return str(path.resolve()) if path.exists() else self.name, "", ""

    def _conversations(self, content: str, split: TextSplit) -> Text:
        lines = take_split(
            parse_lines(self.name, content, Messages), split, self.name, "conversation"
        )
        return Text(self.name, "", conversations=tuple(line.conversation for line in lines))

    def _text(self, content: str, split: TextSplit) -> Text:
        name = split.label(self.name)
        rows = list[Row]()
        if self.has_lines:
            lines = parse_lines(self.name, content, TextLine)
            rows = [Row(line.text, line.query) for line in lines]
            if len(rows) >= MIN_DOCUMENTS:
                rows = [rows[number] for number in split.rows(len(rows))]
                split = WHOLE
            content = PARAGRAPHS.join(row.text for row in rows)
        if not content.strip():
            raise DataError(f"{name} is empty.", hint="Name a file that holds text.")
        if rows and split == WHOLE:
            text = join_documents(name, [row.text for row in rows])
            return replace(text, rows=tuple(rows))
        return Text(name, content[_boundary(content, split.begin) : _boundary(content, split.end)])


def files_beside(name: str) -> list[str]:
    """Return the names of the files of text beside this one."""
    return names_beside(name, *(f"*{suffix}" for suffix in SUFFIXES))


def require_file(name: str) -> None:
    """Raise a DataError unless there is a file of this name."""
    path = local_path(name)
    if not path.exists():
        hint = did_you_mean(path.name, files_beside(name), otherwise="Check the path.")
        raise DataError(f"There is no file {name}.", hint=hint)


def read_file(name: str) -> str:
    """Return the text of a file; raise a DataError if there is none."""
    path = local_path(name)
    try:
        require_file(name)
        if reason := why_not_read(path):
            raise DataError(f"{name} cannot be read: {reason}.", hint="Name a .txt or .jsonl file.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text.", hint="Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
        ) from error


def take_split(items: list[T], split: TextSplit, file: str, what: str) -> list[T]:
    """Return this part of the items of a file; raise a DataError if it has too few to divide."""
    least = 1 if split == WHOLE else MIN_DOCUMENTS
    if len(items) < least:
        raise DataError(
            f"{file} has {plural(len(items), what)}, but needs at least {least}.",
            hint=f"Add more {what}s to it.",
        )
    return [items[row] for row in split.rows(len(items))]


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
