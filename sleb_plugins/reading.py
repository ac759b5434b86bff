"""Whether a file that someone else may have written can be read whole."""

from __future__ import annotations

import stat
from pathlib import Path

from sleb_plugins.formats import format_bytes


def why_not_read(path: Path, most: int | None = None) -> str | None:
    """Return why this is no file of at most `most` bytes: "it is a folder"; None if it is one.

    To open a pipe may take forever, and a device may have no end, so neither is opened.

    Raises:
        OSError: there is no such file, or it cannot be reached.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(found.st_mode):
        return "it is a pipe or a device, not a file"
    if most is not None and found.st_size > most:
        return f"it has {format_bytes(found.st_size)}, and at most {format_bytes(most)} are read"
    return None
