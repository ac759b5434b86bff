"""Places that a checkpoint or GGUF file may be written to."""

from __future__ import annotations

from pathlib import Path

from sleb_cli.atomic import remove_leftovers, require_new_file
from sleb_plugins import OutputError, UsageError


def require_new_folder(folder: Path, *, force: bool) -> None:
    """Check that a folder is new, or with `force` a checkpoint.

    Raises:
        OutputError: it exists (without `force`), or is no checkpoint.
    """
    remove_leftovers(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()) and force):
        return
    if not force:
        raise OutputError(
            f"{folder} already exists.", hint="Choose another folder with -o, or replace it with --force."
        )
    if not (folder / "config.json").is_file():
        raise OutputError(
            f"{folder} exists and is not a checkpoint, so --force does not replace it.",
            hint="Choose another folder with -o, or delete it yourself.",
        )


def require_new_gguf(place: Path, source: Path, *, force: bool) -> None:
    """Check that the place of a GGUF file is free.

    Raises:
        UsageError: its name ends otherwise.
        OutputError: it exists, cannot be written, or is the source itself.
    """
    if place.suffix != ".gguf":
        raise UsageError(f"{place} does not end in .gguf.", hint="Add .gguf to the name.")
    if are_the_same(place, source):
        raise OutputError(f"{place} is the source file itself.", hint="Choose another name with -o.")
    require_new_file(place, force=force)


def are_the_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return one.exists() and other.exists() and one.samefile(other)
