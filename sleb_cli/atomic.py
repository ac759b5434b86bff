"""Write files and folders completely or not at all."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, Literal

from sleb_cli.units import format_bytes
from sleb_plugins.errors import OutputError

SUFFIX = ".partial"
"""The end of the names of hidden files and folders for unfinished work."""
PATIENCE_SECONDS = 5.0
"""How long to wait for another process that writes the same file or folder."""

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose another place with -o."),
    errno.EDQUOT: (
        "your disk quota is exhausted",
        "Free some space, or choose another place with -o.",
    ),
    errno.ENOENT: (
        "its folder does not exist",
        "Create the folder first, or choose another place with -o.",
    ),
    errno.EISDIR: ("it is a folder", "Name a file."),
}


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn errors of the file system into an `OutputError` that names `path`.

    `hint` replaces the usual hint.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(
            error, ConnectionError
        ):  # a library's own words, a socket or a pipe
            raise
        words = str(error.strerror)
        words = words[:1].lower() + words[1:]
        reason, usual_hint = _REASONS.get(error.errno, (words, "Choose another place with -o."))
        raise OutputError(f"Cannot write {path}: {reason}.", hint=hint or usual_hint) from error


def require_new_file(path: Path, *, force: bool) -> None:
    """Check, before hours of work, that `path` can be written and overwrites nothing.

    With `force` it may overwrite a file.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _require_absent(path, replace=force)
    require_writable(path)


def require_writable(path: Path) -> None:
    """Check that files can be made beside `path`."""
    with writing(path):
        _require_writable(_named(path))


def _require_absent(path: Path, *, replace: bool) -> None:
    is_stream = path.is_symlink() and path.readlink().is_relative_to("/proc")  # such as /dev/stdout
    if is_stream or (path.exists() and not (path.is_file() or path.is_dir())):
        raise OutputError(
            f"{path} is a device, a pipe or a socket, not a file.",
            hint="Choose another name with -o.",
        )
    if os.path.lexists(path) and not replace:
        raise OutputError(
            f"{path} already exists.",
            hint="Choose another name with -o, or overwrite it with --force.",
        )


def free_space(path: Path) -> int:
    """Return the free bytes of the disk where `path` is, or would be."""
    return shutil.disk_usage(
        next(folder for folder in (path, *path.parents) if folder.exists())
    ).free


def require_space(path: Path, needed: int) -> None:
    """Check, before anything is written, that `needed` bytes fit on the disk of `path`."""
    folder = path.absolute().parent
    free = free_space(folder)
    if free < needed:
        raise OutputError(
            f"{format_bytes(needed)} must be written, but the disk of {folder} has only "
            f"{format_bytes(free)} free.",
            hint="Free some space, or choose another place with -o.",
        )


def write_text(path: Path, text: str | bytes, *, replace: bool = True) -> None:
    """Write `text`, or a file's bytes, aside, flush it to the disk, and rename it to `path`."""
    with new_file(path, replace=replace) as aside:
        aside.write_bytes(text.encode() if isinstance(text, str) else text)


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a hidden path beside `path`; the file written there becomes `path` at the end."""
    target = _named(path)
    with writing(path):
        _require_absent(target, replace=replace)
        aside = _beside(target)
        try:
            yield aside
            _require_absent(target, replace=replace)
            publish(aside, target)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Claim `path` for hours of work, and yield a path of the same name in a hidden folder.

    The file or folder made there becomes `path` at the end; on an error, it is deleted. Only then
    does it replace another one.

    Raises:
        OutputError: it cannot be written, exists (without `replace`), or another process has
            claimed it.
    """
    target = _named(path)
    with writing(path), lock_folder(target) as folder:
        _require_absent(target, replace=replace)
        yield (aside := folder / target.name)
        _require_absent(target, replace=replace)
        publish(aside, target)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other searches from writing `path`, and what belongs to it, until the end.

    Raises:
        OutputError: another search is writing it, or nothing can be written there.
    """
    from filelock import FileLock, Timeout  # takes 50 ms to import

    require_new_file(path, force=True)
    file = path.parent / f".{path.name}.lock"
    lock = FileLock(file, timeout=0)  # the system releases it if this process is killed
    try:
        with writing(path):
            lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"Another search is writing {path}.",
            hint="Wait until it ends, or choose another plan with -o.",
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file
            file.unlink()
        lock.release()


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder that is deleted at the end, after leftovers of killed processes."""
    remove_leftovers(parent / name, further=".*")
    with lock_folder(parent / f"{name}.{secrets.token_hex(4)}") as folder:
        yield folder


def remove_leftovers(path: Path, further: str = "") -> None:
    """Delete what killed processes left of a file or folder, and restore what they replaced.

    `further` is a pattern for the rest of the name.
    """
    target = _named(path)
    # Only folders with a lock, which are ours.
    for lock in target.parent.glob(f".{escape(target.name)}{further}{SUFFIX}.lock"):
        with suppress(OSError, OutputError), lock_folder(_target(lock.with_suffix("")), patience=0):
            pass


@contextmanager
def lock_folder(path: Path, *, patience: float | None = None) -> Iterator[Path]:
    """Yield an empty hidden folder next to `path` that no other process uses; delete it after.

    Args:
        path: the file or folder that is about to be written.
        patience: how many seconds to wait for another process; `PATIENCE_SECONDS` by default.

    Raises:
        OutputError: another process holds the folder for longer.
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout  # takes 50 ms to import

    target = _named(path)
    folder = _hidden(target)
    _require_writable(target)  # FileLock would wait for a folder to become writable
    # The system releases it when this process ends, even if it is killed.
    lock = FileLock(
        _hidden(target, ".lock"),
        PATIENCE_SECONDS if patience is None else patience,
        thread_local=False,
    )
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"Another sleb process is writing {target}.",
            hint="Wait for it, or choose another name with -o.",
        ) from error
    try:
        if folder.is_symlink() or folder.is_file():  # a link may lead anywhere
            raise FileExistsError(errno.EEXIST, f"{folder.name} is not a folder")
        clear(folder)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        with suppress(OSError):
            clear(folder)
            # Last: a folder without a lock is not known to be ours. Whoever waits for this lock
            # makes a new one.
            _hidden(target, ".lock").unlink()
        lock.release()


def publish(aside: Path, path: Path) -> None:
    """Flush a complete file or folder to the disk and rename it to `path`, replacing what is there.

    Raises:
        OSError: it cannot be renamed; what was there is put back when `lock_folder` ends.
    """
    for entry in (*aside.rglob("*"), aside):
        _flush(entry)
    if aside.is_dir() and os.path.lexists(path):
        # No system call replaces a folder, so for a moment there is neither. `clear` puts the old
        # one back, in this process or, if it is killed, in the next.
        path.rename(_hidden(path, ".old"))
    aside.replace(path)
    _flush(path.parent)


def _named(path: Path) -> Path:
    """Make a path absolute, ending in a name."""
    return path.absolute() if path.name not in ("", "..") else path.resolve()


def _require_writable(target: Path) -> None:
    aside = _beside(target)
    aside.touch()
    aside.unlink()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")


def _hidden(target: Path, kind: Literal["", ".lock", ".old"] = "") -> Path:
    return target.parent / f".{target.name}{SUFFIX}{kind}"


def _target(folder: Path) -> Path:
    return folder.with_name(folder.name.removeprefix(".").removesuffix(SUFFIX))


def clear(folder: Path) -> None:
    """Delete a hidden folder and the old version that it replaced, or put that back."""
    target = _target(folder)
    old = _hidden(target, ".old")
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
    for leftover in (folder, old):
        if leftover.is_dir() and not leftover.is_symlink():
            for inside, _, _ in os.walk(leftover):
                Path(inside).chmod(0o700)  # the old version may be read-only
            shutil.rmtree(leftover)
    old.unlink(missing_ok=True)  # a link to a folder


def _flush(path: Path) -> None:
    # Windows, which has no O_DIRECTORY, cannot open folders, and flushes only what may be written
    # to.
    is_posix = hasattr(os, "O_DIRECTORY")
    if is_posix or not path.is_dir():
        file = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
        try:
            os.fsync(file)
        except OSError as error:  # some network file systems flush no folders
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(file)


def to_json(value: Any) -> str:
    """Write a value as indented JSON, without NaN or infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
