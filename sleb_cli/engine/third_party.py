"""Translate exceptions of libraries into errors about the user's files."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from sleb_plugins import MachineError, ModelError, OutputError, SlebError
from sleb_plugins.errors import first_line, is_out_of_memory


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of the libraries imported so far."""
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


class _FromOurCode(BaseException):
    """Carries an exception of our own code through third-party code, out of reach of its `except
    Exception`.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def pass_errors_through() -> Iterator[None]:
    """Run our own or a plugin's code inside a third-party call: `translate_errors` raises its
    exceptions unchanged.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):  # the library's call around our code is no less to blame
            raise
        raise _FromOurCode(error) from None


@contextmanager
def translate_errors(sentence: Callable[[str], SlebError]) -> Iterator[None]:
    """Turn any exception of a third-party call into the error that `sentence` makes of its message.

    The body must hold nothing but the call, or a bug of ours would be blamed on the files. Our own
    code inside the call runs under `pass_errors_through`. Running out of memory is raised
    unchanged.
    """
    try:
        yield
    except _FromOurCode as carrier:
        error, context = carrier.error, carrier.error.__context__
        try:
            raise error
        finally:
            error.__context__ = context
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
def prefer_disk_error(*verdicts: type[Exception]) -> Iterator[None]:
    """Raise the error of the disk that led to a verdict on a model, instead of the verdict."""
    try:
        yield
    except verdicts as error:
        if cause := disk_error(error):
            raise cause from error
        raise


# Libraries probe for files that may be missing.
_NO_FAILURE = {None, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of the disk that an exception is, or was raised for; None if there is none."""
    while error is not None:
        os_error = (
            error
            if isinstance(error, OSError) and error.errno is not None
            else _parse_os_error(error)
        )
        if (
            os_error
            and os_error.errno not in _NO_FAILURE
            and not isinstance(os_error, ConnectionError)
        ):
            return os_error
        error = error.__cause__ or error.__context__
    return None


def _parse_os_error(error: BaseException) -> OSError | None:
    # Rust and torch put the system's error into words, and keep no number.
    words = str(error)
    for match in re.finditer(r"\((?:os error )?(\d{1,3})\)", words):
        if words[: match.start()].endswith(f"{os.strerror(number := int(match[1]))} "):
            return OSError(number, os.strerror(number))
    # safetensors says so of every file that it cannot open.
    _, missing, path = words.partition("No such file or directory: ")
    return OSError(errno.EIO, os.strerror(errno.EIO)) if missing and os.path.lexists(path) else None


@contextmanager
def translate_transformers_errors(what: str) -> Iterator[None]:
    """Translate the errors of transformers while it reads a user's files into a MachineError or
    ModelError.
    """
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
