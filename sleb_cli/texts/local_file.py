"""Texts in local files: running text, or lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sleb_cli.names import local_path
from sleb_cli.records import why_not_read
from sleb_cli.texts.messages import Messages, TextLine, begins_with_messages, parse_lines
from sleb_cli.texts.source import (
    PARAGRAPHS,
    WHOLE,
    Conversation,
    Text,
    TextSource,
    TextSplit,
    join_documents,
)
from sleb_cli.units import plural
from sleb_plugins import DataError

T = TypeVar("T")

SUFFIXES = frozenset({".txt", ".jsonl", ".md", ".json"})

# With fewer documents, a part of a file may end within one.
MIN_DOCUMENTS = 10


class LocalFile(TextSource):
    """A file of text; a .jsonl file has a document or a conversation in each line."""

    is_endless = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.is_json_lines = Path(name).suffix == ".jsonl"
        self.holds_conversations = self.is_json_lines

    def require(self) -> None:
        """Raise a DataError unless there is such a file."""
        require_file(self.name)

    def text(self, *, tokens: int, seed: int, split: TextSplit = WHOLE) -> Text:
        """Read this part of the file."""
        return self._text(read_file(self.name), split)

    def conversations(
        self, *, samples: int, length: int, seed: int, split: TextSplit = WHOLE
    ) -> list[Conversation]:
        """Read the conversations in this part of the file."""
        return take_split(
            self._conversations(read_file(self.name)), split, self.name, "conversation"
        )

    def evaluation_text(self, length: int) -> Text:
        """Read all of the file: conversations, if its first line has `messages` and no `text`."""
        content = read_file(self.name)
        if self.is_json_lines and begins_with_messages(content):
            return Text(self.name, "", conversations=tuple(self._conversations(content)))
        return self._text(content, WHOLE)

    def origin(self, *, evaluated: bool) -> tuple[str, str, str]:
        """Return the path of the file."""
        path = local_path(self.name)
        return str(path.resolve()) if path.exists() else self.name, "", ""

    def _text(self, content: str, split: TextSplit) -> Text:
        name = split.label(self.name)
        documents = list[str]()
        if self.is_json_lines:
            documents = [line.text for line in parse_lines(self.name, content, TextLine)]
            if len(documents) >= MIN_DOCUMENTS:
                documents = [documents[row] for row in split.rows(len(documents))]
                split = WHOLE
            content = PARAGRAPHS.join(documents)
        if not content.strip():
            raise DataError(f"{name} is empty.", hint="Name a file that holds text.")
        if documents and split == WHOLE:
            return join_documents(name, documents)
        return Text(name, content[_boundary(content, split.begin) : _boundary(content, split.end)])

    def _conversations(self, content: str) -> list[Conversation]:
        return [line.conversation for line in parse_lines(self.name, content, Messages)]


def require_file(name: str) -> None:
    """Raise a DataError unless there is a file of this name."""
    if not local_path(name).exists():
        raise DataError(f"There is no file {name}.", hint="Check the path.")


def read_file(name: str) -> str:
    """Return the text of a file; raise a DataError if there is none."""
    path = local_path(name)
    try:
        if reason := why_not_read(path):
            hint = "Write its text to a file, and name that."
            if path.is_dir():
                hint = "Name a .txt or .jsonl file in it."
            raise DataError(f"{name} cannot be read: {reason}.", hint=hint)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {name}.", hint="Check the path.") from error
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
