"""The removals that the header of a GGUF file records, by the numbers in the model before any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sleb_cli.engine.gguf.file import GgufFile, entry_of_integers
from sleb_plugins.errors import ModelError

REMOVED_BLOCKS = "sleb.removed_blocks"
"""The key that records the removed blocks, in order."""
REMOVED_EXPERTS = "sleb.removed_experts."
"""Before the number of a block: the key that records the experts that it lost, in order."""


def remaining(file: GgufFile, key: str, count: int) -> tuple[list[int], list[int]]:
    """Read the removals that a key records, in order, and find the numbers that the `count` other parts had.

    Raises:
        ModelError: the key does not hold a list of removals.
    """
    recorded: Any = file.get(key)
    if recorded is None:
        return [], list(range(count))
    # No part has the number -1, so the check below refuses it.
    is_list = isinstance(recorded, list) and all(type(number) is int for number in recorded)
    earlier = recorded if is_list else [-1]
    left = sorted({*range(count + len(earlier))}.difference(earlier))
    if len(left) != count:  # a part is named twice or never existed
        raise ModelError(
            f"{key} of {file.path} is not a list of what was removed.", hint="Prune the original model instead."
        )
    return earlier, left


def with_removals(file: GgufFile, key: str, count: int, removals: Sequence[int]) -> GgufFile:
    """Return the header of a file that had `count` parts, and in which a key also records these removals.

    Raises:
        ModelError: the key does not hold a list of removals.
    """
    earlier, left = remaining(file, key, count)
    entry = entry_of_integers(key, [*earlier, *(left[number] for number in removals)])
    return replace(file, entries=(*(other for other in file.entries if other.key != key), entry))
