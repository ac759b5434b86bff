"""Write files and folders completely or not at all."""

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from sleb_cli.units import format_bytes
from sleb_plugins.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"
"""How the names of hidden folders for unfinished work end."""
PATIENCE = 5.0
"""For how many seconds a process waits for another one that writes the same file or folder."""

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose another place with -o."),
    errno.EDQUOT: ("your disk quota is exhausted", "Free some space, or choose another place with -o."),
    errno.EFBIG: ("the file would be larger than this system allows", "Raise the limit (`ulimit -f`)."),
    errno.EROFS: ("the file system is read-only", "Choose another place with -o."),
    errno.EACCES: ("you may not write there", "Choose another place with -o."),
    errno.EPERM: ("you may not write there", "Choose another place with -o."),
    errno.ENOENT: ("its folder does not exist", "Create the folder first, or choose another place with -o."),
    errno.ENOTDIR: ("its parent is a file, not a folder", "Choose another place with -o."),
    errno.EISDIR: ("it is a folder", "Name a file."),
    errno.EEXIST: ("something else was written there meanwhile", "Choose another place with -o."),
    errno.ENOTEMPTY: ("something else was written there meanwhile", "Choose another place with -o."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one with -o."),
    errno.EIO: ("the disk reports an input/output error", "Check the disk, or choose another place with -o."),
}


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn errors of the file system into an `OutputError` that names `path`; `hint` replaces the usual hint.

    What is read meanwhile belongs under `reading`, which names what could not be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):  # a library's own words, a socket or a pipe
            raise
        reason, usual_hint = _REASONS.get(error.errno, (os.strerror(error.errno), _REASONS[errno.EIO][1]))
        raise OutputError(f"Cannot write {path}: {reason}.", hint=hint or usual_hint) from error


def require_new_file(path: Path, *, force: bool) -> None:
    """Make sure, before hours of work, that `path` can be written and overwrites nothing unasked.

    Raises:
        OutputError: the file exists and `force` is not set, nothing can be written there, or another process is
            writing it.
    """
    with writing(path):
        remove_leftovers_of(path)
        if path.is_dir():
            raise OutputError(f"Cannot write {path}: it is a folder.", hint="Name a file.")
        _require_absent(path, replace=force)
        with claim(path):
            pass


def _require_absent(path: Path, *, replace: bool) -> None:
    if os.path.lexists(path) and not replace:
        raise OutputError(f"{path} already exists.", hint="Choose another name with -o, or overwrite it with --force.")


def free_space(path: Path) -> int:
    """Return the free bytes of the disk where `path` is, or would be."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def require_space(path: Path, needed: int) -> None:
    """Make sure, before anything is written, that `needed` bytes fit where `path` will be.

    Raises:
        OutputError: they do not.
    """
    place = path.absolute().parent
    free = free_space(place)
    if free < needed:
        raise OutputError(
            f"{format_bytes(needed)} must be written, but the disk of {place} has only {format_bytes(free)} free.",
            hint="Free some space, or choose another place with -o.",
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` aside, flush it to the disk, and rename it to `path`."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


class Claim:
    """A hidden folder for what is unfinished, locked while this process uses it.

    Whatever ends the process also ends the lock, so a folder whose lock is free was left behind. It is removed by the
    next process that claims the same place or looks for leftovers there.

    Attributes:
        folder: the folder, empty at first; it is removed with its content when the claim is released or forgotten.
    """

    def __init__(self, folder: Path, lock: int | None) -> None:
        self.folder = folder
        self.release = weakref.finalize(self, _remove, folder, lock, os.getpid())

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        self.release()


def claim(target: Path, *, patience: float | None = None) -> Claim:
    """Claim a place for this process alone; `patience` is how many seconds it waits for another one.

    Raises:
        OutputError: another process has claimed it, and keeps it for longer than that.
        OSError: nothing can be written there.
    """
    target = _named(target)
    folder = target.with_name(f".{target.name}{SUFFIX}")
    until = time.monotonic() + (PATIENCE if patience is None else patience)
    try:
        while (lock := _lock(folder)) is None:
            if time.monotonic() > until:
                raise OutputError(
                    f"Another sleb is writing {target}.", hint="Wait until it ends, or choose another name with -o."
                )
            time.sleep(0.01)
    except _NoLockError:
        return _unique(target.parent, target.name)
    claimed = Claim(folder, lock)
    _clear(folder)
    return claimed


def scratch_folder(parent: Path, name: str) -> Claim:
    """Claim a new hidden folder of this name and a random ending; those that killed processes left are removed.

    Raises:
        OSError: nothing can be written there.
    """
    remove_leftovers(parent, f"{escape(name)}.*")
    return _unique(parent, name)


def remove_leftovers(parent: Path, pattern: str = "*") -> None:
    """Remove what killed processes left of files and folders whose name has this pattern; what is in use stays."""
    with suppress(OSError):
        for folder in parent.glob(f".{pattern}{SUFFIX}"):
            with suppress(OSError, _NoLockError):
                if not _lock_file(folder).exists():
                    folder.rmdir()  # empty, it had no lock yet, or no longer; any other is not ours
                elif (lock := _lock(folder)) is not None:
                    _remove(folder, lock, os.getpid())


def remove_leftovers_of(path: Path) -> None:
    """Remove what killed processes left of this file or folder, and put back what they were about to replace."""
    target = _named(path)
    remove_leftovers(target.parent, escape(target.name))


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder beside `path`; the file written there becomes `path` at the end.

    The hidden folder is always deleted, with anything else in it: an unfinished file leaves nothing behind.

    Raises:
        OutputError: it cannot be written, exists (without `replace`), or another process is writing it.
    """
    target = _named(path)
    with writing(path), claim(target) as folder:
        _require_absent(path, replace=replace)
        aside = folder / target.name
        yield aside
        _flush(aside)
        _require_absent(path, replace=replace)
        aside.replace(target)
        _flush(target.parent)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to fill, and rename it to `path` at the end; on an error, delete it.

    With `replace`, an existing folder at `path` is replaced only after the new one is complete.

    Raises:
        OutputError: it cannot be written, exists (without `replace`), or another process is writing it.
    """
    target = _named(path)
    with writing(path), claim(target) as folder:
        _require_absent(path, replace=replace)
        aside = folder / target.name
        aside.mkdir()
        yield aside
        _require_absent(path, replace=replace)
        publish(aside, target)


def publish(aside: Path, path: Path) -> None:
    """Give a complete folder within a claimed one its name; what is there is replaced.

    Raises:
        OSError: it cannot be renamed; what was there still is.
    """
    for place, _, names in os.walk(aside, topdown=False):
        for name in names:
            _flush(Path(place, name))
        _flush(Path(place))
    if not os.path.lexists(path):
        aside.rename(path)
    elif not _exchange(aside, path):
        # For a moment, there is neither. Should the process be killed just then, the next one to come by puts it back.
        old = _old(aside.parent)
        path.rename(old)
        try:
            aside.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _delete(old)
    _flush(path.parent)


class _NoLockError(Exception):
    """A folder is not ours to lock, or its file system knows no locks."""


def _named(path: Path) -> Path:
    """Return an absolute path that ends in a name."""
    return path.absolute() if path.name not in ("", "..") else path.resolve()


def _unique(parent: Path, name: str) -> Claim:
    """Claim a new hidden folder that nobody else knows of."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=SUFFIX))
        try:
            lock = _lock(folder)
        except _NoLockError:
            return Claim(folder, None)
        if lock is not None:
            return Claim(folder, lock)


def _lock(folder: Path) -> int | None:
    """Make a hidden folder, if it is missing, and return its locked file; None if another process is faster.

    Raises:
        _NoLockError: there cannot be one.
    """
    if fcntl is None:
        raise _NoLockError
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        found = folder.lstat()
        # A file is no folder, a link may lead anywhere, and the folder of someone else is not ours to empty.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise _NoLockError
        file = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None  # removed by the process that had it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(_lock_file(folder), follow_symlinks=False)):  # noqa: PTH116
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(file)
        raise _NoLockError from error
    os.close(file)
    return None


def _lock_file(folder: Path) -> Path:
    """Return the file in a hidden folder that is locked; it has another name than what is written there."""
    return folder / f"{folder.name}.lock"


def _old(folder: Path) -> Path:
    """Return where a hidden folder keeps what is being replaced."""
    return folder / f"{folder.name}.old"


def _clear(folder: Path) -> None:
    """Remove what a process left in a hidden folder, except what it was about to replace and did not."""
    target = folder.with_name(folder.name.removeprefix(".").removesuffix(SUFFIX))
    if os.path.lexists(_old(folder)) and not os.path.lexists(target):
        _old(folder).rename(target)
    for path in folder.iterdir():
        if path != _lock_file(folder):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, a link, or a folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove(folder: Path, lock: int | None, owner: int) -> None:
    """Remove a hidden folder; a copy of the process that claimed it does not."""
    if os.getpid() != owner:
        return
    with suppress(OSError):
        _clear(folder)
        # The lock goes last. Whoever makes a new one in between has the folder, which then is not empty and stays.
        if list(folder.iterdir()) == [_lock_file(folder)]:
            _lock_file(folder).unlink()
    if lock is not None:
        os.close(lock)
    with suppress(OSError):
        folder.rmdir()


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk; systems without O_DIRECTORY cannot open folders."""
    if hasattr(os, "O_DIRECTORY") or not path.is_dir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system and the file system can."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def to_json(value: Any) -> str:
    """Return JSON as sleb writes it: indented, in UTF-8, without NaN or infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
