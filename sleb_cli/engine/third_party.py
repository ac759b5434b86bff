"""Calls into other people's code on a user's files, whose refusals are verdicts on those files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sleb_plugins import MachineError, ModelError, SlebError


@contextmanager
def translate_errors(sentence: Callable[[str], SlebError]) -> Iterator[None]:
    """Turn whatever a foreign call raises into the error that `sentence` makes of its words.

    Broken files and unusual families make libraries raise almost anything, so any exception counts. Nothing
    but the foreign call may stand in the body: a bug of ours must not be taken for a verdict.
    """
    try:
        yield
    except SlebError:
        raise
    except Exception as error:
        raise sentence(first_line(error)) from error


@contextmanager
def translate_transformers_errors(what: str) -> Iterator[None]:
    """Let transformers read a user's files.

    Raises:
        MachineError: it lacks a package.
        ModelError: it refuses the files.
    """
    hint = "Check the files, or upgrade with `pip install --upgrade transformers`."
    with translate_errors(lambda words: ModelError(f"transformers cannot read {what}: {words}.", hint=hint)):
        try:
            yield
        except ImportError as error:
            raise MachineError(
                f"transformers needs another package for {what}: {first_line(error)}.",
                hint="Install it, then try again.",
            ) from error


def first_line(error: BaseException) -> str:
    """Give an exception in one line, without a full stop: its words, after its class where they say too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[:2]).rstrip(".")
    return words if " " in words else f"{type(error).__name__} {words}".strip()
