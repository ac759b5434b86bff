"""The parts that earlier removals took, as the header of a GGUF file records them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sleb_cli.engine.gguf.file import GgufFile, entry_of_integers
from sleb_plugins.errors import ModelError

REMOVED_BLOCKS = "sleb.removed_blocks"
"""The key that records the removed blocks, in order."""


def remaining(file: GgufFile, key: str, count: int) -> tuple[list[int], list[int]]:
    """Read the removals that a key records, in order.

    Returns:
        the removals, and the original numbers of the `count` parts that remain.
    """
    recorded: Any = file.get(key)
    if recorded is None:
        return [], list(range(count))
    numbers = []
    if isinstance(recorded, list):
        numbers = sorted({*range(count + len(recorded))}.difference(recorded))
    if len(numbers) != count:  # a part is named twice or never existed
        raise ModelError(
            f"{key} of {file.path} is not a list of what was removed.",
            hint="Prune the original model instead.",
        )
    return recorded, numbers


def with_removals(file: GgufFile, key: str, count: int, removals: Sequence[int]) -> GgufFile:
    """Return the header of a file of `count` parts in which a key also records these removals."""
    earlier, numbers = remaining(file, key, count)
    entry = entry_of_integers(key, [*earlier, *(numbers[removed] for removed in removals)])
    return replace(file, entries=(*(other for other in file.entries if other.key != key), entry))
