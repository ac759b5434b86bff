"""The lines of .jsonl files, and the rows of data sets: texts, conversations and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from sleb_cli.records import first_fault
from sleb_cli.texts.source import Conversation
from sleb_plugins import DataError


class TextLine(BaseModel):
    """A line that holds a document, or a pair of a query and a text."""

    text: str
    query: str | None = None


Label = str | int | float
"""A class, by its name or its number; or how relevant a text is."""


class CorpusLine(TextLine):
    """A text, or a pair of a query and a text, with or without a label."""

    label: Label | None = None


class CorpusEntry(BaseModel):
    """A document or a query of a folder in BEIR's form."""

    id: str = Field(alias="_id", coerce_numbers_to_str=True)
    title: str | None = None
    text: str


class Message(BaseModel, extra="allow"):
    """A message of a conversation."""

    role: str
    content: str


class Messages(BaseModel):
    """A line or a row that holds a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]

    @property
    def conversation(self) -> Conversation:
        """The messages as a chat template takes them."""
        return dump_messages(self.messages)


class Prompt(BaseModel):
    """A line that holds a prompt; answers at the end of `messages` are left out."""

    prompt: str | None = None
    messages: list[Message] = []

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Prompt:
        if all(message["role"] in ("system", "developer") for message in self.conversation):
            raise ValueError("there is no prompt")
        return self

    @property
    def conversation(self) -> Conversation:
        """The messages that lead to the answer."""
        messages = dump_messages(self.messages)
        if self.prompt:
            messages.append({"role": "user", "content": self.prompt})
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages


def dump_messages(messages: list[Message]) -> Conversation:
    """Return messages without the empty fields that a data set fills in."""
    return [message.model_dump(exclude_none=True) for message in messages]


_Line = TypeVar("_Line", bound=BaseModel)


def parse_lines(source: str, content: str, form: type[_Line]) -> list[_Line]:
    """Parse each line of a .jsonl file; raise a DataError that names the first bad one."""
    parsed = list[_Line]()
    # Not by `splitlines`: strings in JSON may hold other line separators.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            with naming_faults(f"Line {number} of {source}"):
                parsed.append(form.model_validate_json(line))
    return parsed


def begins_with_messages(content: str) -> bool:
    """Whether the first line of a .jsonl file holds a conversation."""
    first = content.lstrip().partition("\n")[0]
    try:
        line = TypeAdapter(dict[str, Any]).validate_json(first)
    except ValidationError:  # reading it as text names the fault
        return False
    return line.get("messages") is not None and line.get("text") is None


@contextmanager
def naming_faults(where: str) -> Iterator[None]:
    """Turn what pydantic says into a DataError about this place."""
    try:
        yield
    except ValidationError as error:
        raise DataError(
            f"{where} cannot be read: {first_fault(error, 'JSON')}.",
            hint='Each line needs {"text": "…"}; for answers:FILE, {"prompt": "…"}; for '
            'conversations, {"messages": [{"role": "…", "content": "…"}]}.',
        ) from error
