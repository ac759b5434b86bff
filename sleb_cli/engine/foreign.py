"""Calls into transformers on a user's files: what it raises there is a verdict on the files."""

from collections.abc import Iterator
from contextlib import contextmanager

from sleb_plugins import MachineError, ModelError


@contextmanager
def transformers_reads(what: str) -> Iterator[None]:
    """Give a refusal by transformers as a sentence with its own words.

    Nothing but its call may stand in the body: a broken config makes it raise almost anything, so any
    exception counts, and a bug of ours must not be among them.

    Raises:
        MachineError: it lacks a package.
        ModelError: it raised anything else.
    """
    try:
        yield
    except ImportError as error:
        raise MachineError(
            f"transformers needs another package for {what}: {first_line(error)}.", hint="Install it, then try again."
        ) from error
    except Exception as error:
        raise ModelError(
            f"transformers cannot read {what}: {first_line(error)}.",
            hint="Check the files, or upgrade with `pip install --upgrade transformers`.",
        ) from error


def first_line(error: BaseException) -> str:
    """Give an exception in one line, without a full stop: its words, after its class where they say too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[:2]).rstrip(".")
    return words if " " in words else f"{type(error).__name__} {words}".strip()
