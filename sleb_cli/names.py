"""Names of models, texts and checkpoints, also without the folders of this machine."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from sleb_plugins.errors import ModelError, did_you_mean

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


def names_beside(named: str, *patterns: str) -> list[str]:
    """Return names beside a path that fit a pattern: `*.json`, or `*/config.json` for folders."""
    folder = local_path(named).parent
    names = []
    for pattern in patterns:
        names += [path.relative_to(folder).parts[0] for path in folder.glob(pattern)]
    return sorted(names)


def closest_model(named: str, otherwise: str) -> str:
    """Return a hint with the model beside a path whose name is closest."""
    models = names_beside(named, "*.gguf", "*/config.json")
    return did_you_mean(local_path(named).name, models, otherwise)


def require_path(model: str) -> None:
    """Raise a ModelError if a name can only be that of a file or folder, and there is none."""
    if (is_path(model) or model.endswith(".gguf")) and not local_path(model).exists():
        hint = closest_model(model, "Check the path.")
        raise ModelError(f"There is no folder or file {model}.", hint=hint)


def checkpoint_name(base: str, blocks: int, suffixes: Sequence[str] = ()) -> str:
    """Return the default name of a pruned checkpoint."""
    return "-".join([f"{base.removesuffix('.gguf')}-sleb-{blocks}-blocks", *suffixes])


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder, not of something on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def without_folders(name: str) -> str:
    """Return the last part of a local path; other names, such as Hub ids, stay."""
    if not is_path(name):
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
