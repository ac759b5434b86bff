"""Write files and folders completely or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb_cli.units import format_bytes
from sleb_plugins.errors import OutputError

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
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one with -o."),
}


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn errors of the file system into an `OutputError` that names `path`; `hint` replaces the usual hint."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        reason, usual_hint = _REASONS[error.errno]
        raise OutputError(f"Cannot write {path}: {reason}.", hint=hint or usual_hint) from error


def require_new_file(path: Path, *, force: bool) -> None:
    """Make sure, before hours of work, that `path` can be written and overwrites nothing unasked.

    Raises:
        OutputError: the file exists and `force` is not set, or nothing can be written there.
    """
    if path.is_dir():
        raise OutputError(f"Cannot write {path}: it is a folder.", hint="Name a file.")
    if path.exists() and not force:
        raise OutputError(f"{path} already exists.", hint="Choose another name with -o, or overwrite it with --force.")
    with writing(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder beside `path`; the file written there becomes `path` at the end.

    The hidden folder is always deleted, with anything else in it: an unfinished file leaves nothing behind.
    """
    target = path.absolute()
    with writing(path):
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        with writing(path):
            aside = folder / target.name
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path` to fill, and rename it to `path` at the end; on an error, delete it.

    With `replace`, an existing folder at `path` is replaced only after the new one is complete.
    """
    path = path.absolute()
    with writing(path):
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        with writing(path):
            aside.chmod(0o777 & ~_umask())
            yield aside
            if replace and path.exists():
                old = aside.with_suffix(".replaced")
                path.rename(old)
                try:
                    aside.rename(path)
                except BaseException:
                    old.rename(path)
                    raise
                shutil.rmtree(old)
            else:
                aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def to_json(value: Any) -> str:
    """Return JSON as sleb writes it: indented, in UTF-8, without NaN or infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
