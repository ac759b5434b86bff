"""Bytes from one file to another, through this process only where the system knows no shorter way."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from sleb_plugins import ModelError

BUFFER_BYTES = 1 << 20
"""What is in memory where bytes do come through this process."""

_CHUNK_BYTES = 16 << 20
_FICLONE = 0x40049409
# What only the target can mean: no other way of copying would get past it.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Advance = Callable[[int], object]
"""Told of every stretch of bytes as it is done."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a file system may refuse into a `ModelError` that names `path`."""
    try:
        yield
    except PermissionError as error:
        raise ModelError(f"You may not read {path}.", hint="Change its permissions.") from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}.", hint="Copy or download it again."
        ) from error


def share_blocks(source: Path, target: Path) -> Literal["reflink", "hard link"] | None:
    """Let `target` have the content of `source` without copying it, or give None where the file system cannot.

    A reflink is a copy in every respect: writing to one file leaves the other alone. A hard link is one file with
    two names, so it comes second, and whoever makes one must say so: an edit in place would change both. (Programs that
    save models write a new file, and leave the other name what it was.)
    """
    real = source.resolve()  # in a hub cache, `source` is a symlink to the file itself
    if _reflink(real, target):
        return "reflink"
    try:
        os.link(real, target)
    except OSError:  # another file system, or one without links, or a file of somebody else
        return None
    return "hard link"


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with reading(source):
        original = source.open("rb")
    with original, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def copy_file(source: Path, target: Path, advance: Advance = lambda count: None) -> None:
    """Copy a file's content.

    Raises:
        ModelError: `source` cannot be read.
    """
    with reading(source):
        original = source.open("rb", buffering=0)
    with original, target.open("xb", buffering=0) as copy:
        copy_range(original, 0, os.fstat(original.fileno()).st_size, copy, advance)


def copy_range(source: BinaryIO, start: int, count: int, target: BinaryIO, advance: Advance) -> None:
    """Append `count` bytes of `source`, from `start` on, to `target`. Both are unbuffered.

    Raises:
        ModelError: the bytes cannot be read, or are not there any more.
    """
    end = start + count
    for in_kernel in (_copy_file_range, _sendfile):
        while start < end:
            try:
                done = in_kernel(source.fileno(), target.fileno(), start, min(_CHUNK_BYTES, end - start))
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                break  # not here, not between these two, or a fault that the plain way tells apart
            if not done:
                break
            start += done
            advance(done)
    for part in read_range(source, start, end - start):
        write_all(target, part)
        advance(len(part))


def _copy_file_range(source: int, target: int, start: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "copy_file_range")
    return os.copy_file_range(source, target, count, start)


def _sendfile(source: int, target: int, start: int, count: int) -> int:
    if sys.platform != "linux":  # elsewhere it only sends to sockets
        raise OSError(errno.ENOSYS, "sendfile")
    return os.sendfile(target, source, start, count)


def read_range(source: BinaryIO, start: int, count: int) -> Iterator[memoryview]:
    """Give `count` bytes from `start` on, in parts that are valid until the next one is asked for.

    Raises:
        ModelError: they cannot be read, or are not there any more.
    """
    path = Path(source.name)
    buffer = memoryview(bytearray(min(BUFFER_BYTES, count)))
    with reading(path):
        source.seek(start)
    while count:
        with reading(path):
            done = source.readinto(buffer[:count])  # type: ignore[attr-defined]
        if not done:
            raise ModelError(f"{path} became shorter while it was read.", hint="Try again when nobody writes to it.")
        yield buffer[:done]
        count -= done


def write_all(target: BinaryIO, part: memoryview | bytes) -> None:
    """Write all of `part`: an unbuffered file may take less at a time."""
    view = memoryview(part)
    while view:
        view = view[target.write(view) :]
