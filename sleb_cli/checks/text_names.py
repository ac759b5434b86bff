"""How texts are named: presets, local files, data sets on the Hub, and what the model writes
itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.names import ANSWERS, local_path
from sleb_plugins import DataError
from sleb_plugins.errors import did_you_mean

SELF, SELF_CHAT = "self", "self-chat"
"""Text and conversations that the model writes itself."""
REFERENCE_PRESETS = frozenset({"wikitext2-sleb", "c4-sleb"})
"""Texts that are drawn as in the reference implementation."""
PRESETS = frozenset({"wikitext2", "c4"}) | REFERENCE_PRESETS


def writes_conversations(source: str) -> bool:
    """Whether the model is to write conversations."""
    return source == SELF_CHAT or source.startswith(ANSWERS)


def is_written(source: str) -> bool:
    """Whether the model is to write this source."""
    return source == SELF or writes_conversations(source)


def holds_conversations(source: str) -> bool:
    """Whether a source can hold conversations: plain text does not."""
    if writes_conversations(source):
        return True
    return Path(source).suffix == ".jsonl" if is_file(source) else "/" in source


def is_file(source: str) -> bool:
    """Whether a source is a local file rather than a preset or a data set."""
    path = Path(source)
    if source in PRESETS or writes_conversations(source):
        return False
    return (
        path.exists()
        or path.suffix in {".txt", ".jsonl", ".md", ".json"}
        or source.startswith((".", "/", "~"))
    )


def require_mixture(text: str | None) -> None:
    """Check that the sources of a calibration text are named as they must be, and that its files
    are there.

    Raises:
        UsageError: the mixture is invalid.
        DataError: a file is missing, or a source is none.
    """
    require_sources(parse_mixture(text) if text else ())


def require_sources(sources: Iterable[str], *, measured: bool = False) -> None:
    """Check that these are sources, to calibrate on or to be `measured`, and that local files are
    there.

    Raises:
        DataError: one is not.
    """
    for source in sources:
        file = source.removeprefix(ANSWERS)
        path, *parts = source.split(":")
        if measured and (is_written(source) or source in REFERENCE_PRESETS):
            raise DataError(
                f"{source} is text to calibrate on.",
                hint="Use wikitext2, c4, a .txt or .jsonl file, or a data set: "
                "org/name[:config][:split][:column].",
            )
        if file != source or is_file(source):
            if not local_path(file).exists():
                raise DataError(f"There is no file {file}.", hint="Check the path.")
        elif (
            source not in PRESETS and not is_written(source) and ("/" not in path or len(parts) > 3)
        ):
            every = "Use wikitext2, c4, self, a .txt or .jsonl file, or org/name[:config][:split][:column]."
            known = [*sorted(PRESETS), *([] if measured else [SELF, SELF_CHAT])]
            raise DataError(
                f"Unknown text source {source!r}.",
                hint=did_you_mean(source, known, otherwise=every),
            )
