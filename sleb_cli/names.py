"""Names of models, texts and checkpoints, also without the folders of this machine."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_FILE = re.compile(r"\.(txt|jsonl|md|json)$")
# What comes before the file of some texts: "answers:prompts.txt".
_KIND = re.compile(r"[a-z]{2,}:(?!//)")
_SHARE = r":[\d.]+(?:e-?\d+)?(?:/\d+)?"
_MIXTURE = re.compile(rf"[^,]+{_SHARE}(?:,[^,]+{_SHARE})*")

# The folders of any path in a sentence: "Loading /home/jane/My models/". They end at a comma and
# before another path.
_FOLDERS = re.compile(r"(?<!\S)(?:~|\.{1,2})?/(?:(?:(?!\s[~.]{0,2}/)[^,])*/)?(?=[^/\s])")


def local_path(named: str) -> Path:
    """Return the path that a user named; a leading ~ is the home folder."""
    try:
        return Path(named).expanduser() if named.startswith("~") else Path(named)
    except RuntimeError:  # there is no such user
        return Path(named)


def checkpoint_name(base: str, blocks: int, suffixes: Sequence[str] = ()) -> str:
    """Return the default name of a pruned checkpoint."""
    return "-".join([f"{base.removesuffix('.gguf')}-sleb-{blocks}-blocks", *suffixes])


def without_folders(name: str) -> str:
    """Return the last part of a local path; other names, such as Hub ids, stay."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if not is_path:
        return name
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def public_source(source: str) -> str:
    """Return a text source or mixture without the folders of local files."""
    return ",".join(_without_folders(name) + share for name, share in split_mixture(source))


def public_command(command: str) -> str:
    """Return a command line without the folders of local files."""
    words = []
    for word in shlex.split(command):
        words.append(",".join(map(public_source, word.split(","))))
    return shlex.join(words)


def split_mixture(source: str) -> list[tuple[str, str]]:
    """Return each source with its share (":0.5"), which is "" for a single source."""
    if not _MIXTURE.fullmatch(source):
        return [(source, "")]
    entries = re.findall(rf"([^,]+?)({_SHARE})(?:,|$)", source)
    return [(name.strip(), share) for name, share in entries]


def _without_folders(source: str) -> str:
    match = _KIND.match(source)
    kind = match[0] if match else ""
    named = source.removeprefix(kind)
    if _FILE.search(named):
        return kind + named.rpartition("/")[2]
    name, colon, rest = named.partition(":")
    return kind + without_folders(name) + colon + rest


def short_name(text: str) -> str:
    """Drop the folders of every local path in a name or sentence."""
    return _FOLDERS.sub("", text)


def elide(text: str, width: int) -> str:
    """Shorten a text to `width` characters by an ellipsis in its middle."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
