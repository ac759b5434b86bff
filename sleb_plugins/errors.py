"""Errors a user can act on, and the exit code of each class."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_…"),
    (re.compile(r"\b(Bearer|Basic) [\w.+/=-]{8,}"), r"\1 …"),
    (re.compile(r"://[^/\s@'\"]+@"), "://…@"),
    (
        re.compile(r"(?i)([?&][\w-]*(?:token|signature|credential|policy|key)[\w-]*)=[^&\s'\"]+"),
        r"\1=…",
    ),
)


_OPTION = re.compile(r"(?<![\w-])(?:--(\w[\w-]*)|-o\b)")


def without_secrets(text: str) -> str:
    """Return a text without tokens, signatures, and passwords in addresses."""
    for name in _TOKENS:
        token = os.environ.get(name, "").strip()
        if len(token) >= 8:
            text = text.replace(token, "…")
    for secret, shown in _SECRETS:
        text = secret.sub(shown, text)
    return text


def first_line(error: BaseException) -> str:
    """Return an exception's message on one line, without secrets; one word follows its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = without_secrets(" ".join(lines[:2]).rstrip("."))
    return words if " " in words else f"{type(error).__name__} {words}".strip()


def in_python(text: str) -> str:
    """Name options as the arguments of a request, except within a command in backticks."""
    parts = text.split("`")
    parts[::2] = [
        _OPTION.sub(lambda match: (match[1] or "output").replace("-", "_"), prose)
        for prose in parts[::2]
    ]
    return "`".join(parts)


class SlebError(Exception):
    """A sentence for the user that says what happened, and a `hint` that says what to do about it.

    Tokens and passwords in either are left out. What Python shows of it names arguments instead of
    options.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str) -> None:
        self.message = without_secrets(message)
        self.hint = without_secrets(hint)
        super().__init__(in_python(self.message))
        self.add_note(f"Hint: {in_python(self.hint)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error be sent from process to process."""
        return partial(type(self), hint=self.hint), (self.message,), self.__dict__


class UsageError(SlebError):
    """The command line is invalid, or asks for the impossible."""

    exit_code = 2


class PlanError(SlebError):
    """The plan is missing or unreadable, comes from a newer sleb, or was made for another model."""

    exit_code = 3


class ModelError(SlebError):
    """The model cannot be found or read, changes meanwhile, or does not run to finite numbers or
    with a KV cache.
    """

    exit_code = 4


class UnsupportedModelError(ModelError):
    """The model is complete, but is none whose blocks sleb can remove."""


class DataError(SlebError):
    """A text, data set or task is missing, unreadable or too small."""

    exit_code = 5


class PluginError(SlebError):
    """A plugin is missing or broken, or claims a name that another plugin has."""

    exit_code = 6


class MachineError(SlebError):
    """The machine or the installation lacks something: a device, pip, the package index."""

    exit_code = 7


class OutOfMemory(MachineError):
    """The device is out of memory; smaller pieces may still fit."""


class OutputError(SlebError):
    """The result cannot be written: it already exists, or its place is read-only or full.

    Attributes:
        unsaved: the result as JSON holds it, if the work was done and only writing failed.
    """

    exit_code = 8
    unsaved: Mapping[str, Any] | None = None


class ProofError(SlebError):
    """The pruned checkpoint differs from the dense model with these blocks skipped, and was not
    delivered.
    """

    exit_code = 9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device is out of memory; torch has no class of its own for
    MPS and CPU.
    """
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in said)
    )


@contextmanager
def explain_out_of_memory(
    message: str | None, hint: str, error_class: type[MachineError] = OutOfMemory
) -> Iterator[None]:
    """Turn running out of memory into an error that says what did not fit.

    Without a `message`, the library's own first line is quoted.

    Raises:
        MachineError: the body ran out of memory; by default an OutOfMemory, after which smaller
            pieces are tried.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or ["no more memory"])[0].rstrip(".")
        raise error_class(message or f"Out of memory: {said}.", hint=hint) from error


def did_you_mean(name: str, names: Sequence[str], otherwise: str | None = None) -> str:
    """Return a hint with the one of `names` that is closest to `name`; if none is close,
    `otherwise` or all names.
    """
    close = get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return otherwise or f"Choose from: {', '.join(names) or 'none'}."
