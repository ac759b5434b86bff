"""Places that a checkpoint or GGUF file may be written to."""

from pathlib import Path

from sleb_cli.atomic import remove_leftovers, require_new_file, require_writable
from sleb_plugins import OutputError, UsageError


def require_new_place(place: Path, gguf: Path | None, *, force: bool) -> None:
    """Check that the place of a checkpoint, or of a GGUF file made from `gguf`, is free.

    Raises:
        UsageError: the name of a GGUF file ends otherwise.
        OutputError: it exists (without `force`), is no checkpoint, cannot be written, or is the
            source itself.
    """
    if gguf is not None:
        if place.suffix != ".gguf":
            raise UsageError(f"{place} does not end in .gguf.", hint="Add .gguf to the name.")
        if are_the_same(place, gguf):
            raise OutputError(
                f"{place} is the source file itself.", hint="Choose another name with -o."
            )
        require_new_file(place, force=force)
        return
    remove_leftovers(place)
    if place.exists() and not force:
        raise OutputError(
            f"{place} already exists.",
            hint="Choose another folder with -o, or replace it with --force.",
        )
    is_empty = place.is_dir() and not any(place.iterdir())
    if place.exists() and not is_empty and not (place / "config.json").is_file():
        raise OutputError(
            f"{place} exists and is not a checkpoint, so --force does not replace it.",
            hint="Choose another folder with -o, or delete it yourself.",
        )
    require_writable(place)


def are_the_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return one.exists() and other.exists() and one.samefile(other)
