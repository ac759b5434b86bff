"""Names of models, texts and checkpoints, as users write them, and without the folders of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ANSWERS = "answers:"
"""Begins a source of calibration text: the model's answers to the prompts in the file that is named next."""

_FILE = re.compile(r"\.(txt|jsonl|md|json)$")
_SHARE = r":[\d.]+(?:e-?\d+)?(?:/\d+)?"
_MIXTURE = re.compile(rf"[^,]+{_SHARE}(?:,[^,]+{_SHARE})*")

# A path up to its last part, wherever a sentence holds one: "Loading /home/jane/My models/". It ends before a comma and
# before another path.
_FOLDERS = re.compile(r"(?<!\S)(?:~|\.{1,2})?/(?:(?:(?!\s[~.]{0,2}/)[^,])*/)?(?=[^/\s])")


def local_path(named: str) -> Path:
    """Return the path that a user named, as a shell reads it: only a leading ~ may stand for a home folder."""
    try:
        return Path(named).expanduser() if named.startswith("~") else Path(named)
    except RuntimeError:  # nobody has this name
        return Path(named)


def checkpoint_name(base: str, blocks: int, parts: Sequence[str] = ()) -> str:
    """Return the default name of a pruned checkpoint of a model, which may be a GGUF file."""
    return "-".join([f"{base.removesuffix('.gguf')}-sleb-{blocks}-blocks", *parts])


def without_folders(name: str) -> str:
    """Return the last part of a local path; other names, such as Hub ids, stay as they are."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if is_path else name


def public_source(source: str) -> str:
    """Return a source of text, which may be a mixture, without the folders of local files and data sets."""
    return ",".join(_without_folders(each) + share for each, share in parts_of_mixture(source))


def public_command(command: str) -> str:
    """Return a command line without the folders of local models, texts and tasks."""
    return shlex.join(",".join(map(public_source, word.split(","))) for word in shlex.split(command))


def parts_of_mixture(source: str) -> list[tuple[str, str]]:
    """Return each source with its share, as in ":0.5"; the share of a single source is empty."""
    if not _MIXTURE.fullmatch(source):
        return [(source, "")]
    return [(each.strip(), share) for each, share in re.findall(rf"([^,]+?)({_SHARE})(?:,|$)", source)]


def _without_folders(source: str) -> str:
    if _FILE.search(source):
        return ANSWERS * source.startswith(ANSWERS) + source.removeprefix(ANSWERS).rpartition("/")[2]
    place, colon, rest = source.partition(":")
    return without_folders(place) + colon + rest


def short_name(text: str) -> str:
    """Return a name or a sentence with the last part of each local path only."""
    return _FOLDERS.sub("", text)


def elide(text: str, width: int) -> str:
    """Return a text of at most `width` characters, with an ellipsis in its middle if it has more."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
