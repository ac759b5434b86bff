"""Translate exceptions of libraries into errors about the user's files."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from sleb_plugins import MachineError, ModelError, OutputError, SlebError
from sleb_plugins.errors import first_line, is_out_of_memory

_KERNELS = "USE_HUB_KERNELS"
"""The environment variable by which transformers may load kernels."""


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of the libraries imported so far."""
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def disable_hub_kernels() -> Callable[[], None]:
    """Have transformers run no compiled code from the Hub, as it does by default since 5.25.

    Returns:
        what sets the environment variable as it was.
    """
    before = os.environ.get(_KERNELS)
    os.environ[_KERNELS] = "NO"
    return partial(_restore_kernels, before)


def _restore_kernels(before: str | None) -> None:
    del os.environ[_KERNELS]
    if before is not None:
        os.environ[_KERNELS] = before


@contextmanager
def translate_errors(sentence: Callable[[str], SlebError]) -> Iterator[None]:
    """Turn any exception of a third-party call into the error that `sentence` makes of its message.

    The body must hold nothing but the call, or a bug of ours would be blamed on the files. Errors
    of ours, and running out of memory, are raised unchanged.
    """
    try:
        yield
    except SlebError:
        raise
    except BaseException as error:
        # A panic in Rust, such as of a tokenizer, is no Exception.
        is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if is_out_of_memory(error) or not is_failure:
            raise
        raise sentence(first_line(error)) from error


def error_saying(kind: type[SlebError], what: str, hint: str) -> Callable[[str], SlebError]:
    """Make an error of an exception's words, "what: words.", for `translate_errors`."""
    return lambda words: kind(f"{what}: {words}.", hint=hint)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an error of safetensors in writing into an `OutputError`."""
    try:
        yield
    except SafetensorError as error:
        raise OutputError(
            f"Cannot write {path}: {first_line(error)}.",
            hint="Free some space, or choose another place.",
        ) from error


@contextmanager
def translate_transformers_errors(what: str) -> Iterator[None]:
    """Turn transformers' errors in reading a user's files into a MachineError or ModelError."""
    hint = "Check the files, or upgrade with `pip install --upgrade transformers`."
    with translate_errors(error_saying(ModelError, f"transformers cannot read {what}", hint)):
        try:
            yield
        except ImportError as error:
            raise MachineError(
                f"transformers needs another package for {what}: {first_line(error)}.",
                hint="Install it, then try again.",
            ) from error


@contextmanager
def internals(package: str) -> Iterator[None]:
    """Import names from inside a package, or say that this version has them elsewhere."""
    try:
        yield
    except ImportError as error:
        raise MachineError(
            f"This sleb does not know {package} {version(package)}: {first_line(error)}.",
            hint=f"Install an older {package}, or a newer sleb.",
        ) from error
