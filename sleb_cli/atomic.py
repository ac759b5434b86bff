"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb_cli.units import size
from sleb_plugins.errors import OutputError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose another place with -o."),
    errno.EDQUOT: ("your disk quota is used up", "Free some space, or choose another place with -o."),
    errno.EFBIG: ("the file would be larger than this system allows", "Raise the limit (`ulimit -f`)."),
    errno.EROFS: ("the file system is read-only", "Choose another place with -o."),
    errno.EACCES: ("you may not write there", "Choose another place with -o."),
    errno.EPERM: ("you may not write there", "Choose another place with -o."),
    errno.ENOENT: ("its folder does not exist", "Create the folder first, or choose another place with -o."),
    errno.ENOTDIR: ("its parent is a file, not a folder", "Choose another place with -o."),
    errno.EISDIR: ("it is a folder", "Give the name of a file."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one with -o."),
}


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn what a file system may refuse into an `OutputError` that names `path`; `hint` replaces the usual one."""
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
        raise OutputError(f"Cannot write {path}: it is a folder.", hint="Give the name of a file.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists.", hint="Choose another name with -o, or overwrite it with --force.")
    with writing(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


def require_space(path: Path, needed: int) -> None:
    """Make sure, before anything is written, that `needed` bytes fit where `path` will be.

    Raises:
        OutputError: they do not.
    """
    place = path.absolute().parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{size(needed)} are to be written, and the disk of {place} has {size(free)} free.",
            hint="Free some space, or choose another place with -o.",
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` aside, flush it to the disk, and rename it to `path`."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a place of the same name in a hidden folder beside `path`; what is written there becomes `path` at the end.

    The folder goes at the end, with whatever else is in it: nothing at all is left of what was not finished.
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
    """Give a folder beside `path` to fill; rename it to `path` at the end, or leave nothing at all.

    What stood at `path` before is kept until the new folder is whole, and only then replaced.
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
    """Write JSON as people read it: what holds only plain values stands on one line."""
    return _json_lines(value, "") + "\n"


def _json_lines(value: Any, indent: str) -> str:
    if not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    parts = list(value.values()) if isinstance(value, dict) else value
    if indent and not any(isinstance(part, dict | list) for part in parts) and _is_series(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    names: list[str] = [f"{json.dumps(str(key))}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    lines = [inner + name + _json_lines(part, inner) for name, part in zip(names, parts, strict=True)]
    brackets = "{}" if isinstance(value, dict) else "[]"
    return f"{brackets[0]}\n" + ",\n".join(lines) + f"\n{indent}{brackets[1]}"


def _is_series(value: Any) -> bool:
    """Whether a container is a list, or a mapping from numbers, which reads best on one line."""
    return isinstance(value, list) or all(str(key).isdigit() for key in value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
