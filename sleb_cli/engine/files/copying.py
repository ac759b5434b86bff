"""Files of a model's folder, and bytes copied between files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from sleb_plugins import ModelError

BUFFER_BYTES = 1 << 18
"""Bytes read at a time: so few that they are still in a processor's cache when they are written."""

ReportBytes = Callable[[int], object]
"""Called with the number of bytes copied since the last call."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a `ModelError` that names `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no {path.name}.", hint="Name a folder that holds a model."
        ) from error
    except OSError as error:
        hint = (
            "Change its permissions."
            if isinstance(error, PermissionError)
            else "Copy or download it again."
        )
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.", hint=hint) from error


def links_outside(path: Path, folder: Path) -> bool:
    """Whether a link leads from an entry of a model's folder to a file elsewhere."""
    # Unlike `Path.resolve`, this never raises, even on loops of links.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    # The files of a snapshot in the Hub's cache are links to its blobs. An archive may hold folders
    # of these names, and in place of the blobs a link.
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return not any(real.is_relative_to(allowed) for allowed in (home, blobs))


def holds_file(folder: Path, name: str) -> bool:
    """Whether a model's folder holds this file itself, and no link to a file elsewhere."""
    return (folder / name).is_file() and not links_outside(folder / name, folder)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content."""
    with reading(source):
        original = source.open("rb")
    with original, target.open("xb") as copy:
        copy_range(original, 0, os.fstat(original.fileno()).st_size, copy, lambda count: None)


def copy_range(
    source: BinaryIO, start: int, count: int, target: BinaryIO, report: ReportBytes
) -> None:
    """Append `count` bytes of `source`, from byte `start`, to `target`."""
    path = Path(source.name)
    with reading(path):
        source.seek(start)
    while count:
        with reading(path):
            chunk = source.read(min(BUFFER_BYTES, count))
        if not chunk:
            raise ModelError(
                f"{path} became shorter while it was read.",
                hint="Try again when no program writes to it.",
            )
        target.write(chunk)
        report(len(chunk))
        count -= len(chunk)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first number of each run of consecutive numbers, and its length."""
    # Within a run, a number and its index grow alike, so their difference names the run.
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], len(run)
