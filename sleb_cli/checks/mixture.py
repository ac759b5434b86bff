"""Mixtures of calibration texts: which sources, how much of each, and in which order.

Pure arithmetic.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from sleb_plugins import UsageError


def parse_mixture(text: str) -> dict[str, Fraction]:
    """Parse "wikitext2:0.5,c4:0.5", or one source alone, into each source's share of sequences.

    A local file of exactly this name takes precedence.

    Raises:
        UsageError: a share is missing or invalid, the shares do not sum to 1, or a source is named
            twice.
    """
    entries = [_parse_entry(entry.strip()) for entry in text.split(",")]
    if Path(text).exists() or [share for _, share in entries] == [None]:
        return {text: Fraction(1)}
    shares: dict[str, Fraction] = {}
    for source, share in entries:
        if share is None or not source:
            raise UsageError(
                f"{source or 'A source'} has no share in the mixture {text!r}.",
                hint="Write the share of each source: --calibration wikitext2:0.5,c4:0.5.",
            )
        if source in shares:
            raise UsageError(
                f"{text!r} names {source} twice.", hint="Name it once, with the sum of its shares."
            )
        shares[source] = share
    total = sum(shares.values())
    if total != 1:
        raise UsageError(
            f"The shares of {text!r} sum to {float(total):g}, not to 1.",
            hint="Thirds can be written as 1/3.",
        )
    return shares


def _parse_entry(text: str) -> tuple[str, Fraction | None]:
    """Split a source from its share, a number above 0 and at most 1."""
    source, colon, end = text.rpartition(":")
    try:
        share = Fraction(end if "/" in end else repr(float(end)))  # as in `parse_ratio`
    except (ValueError, ZeroDivisionError):
        return text, None
    if not (colon and 0 < share <= 1):
        return text, None
    return source, share


def divide(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide `count` into whole numbers by shares that sum to 1, rounding up large remainders.

    Ties go to the earlier share.
    """
    whole = [math.floor(count * share) for share in shares]
    remainders = [count * share - number for share, number in zip(shares, whole, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda index: (-remainders[index], index))
    for index in by_remainder[: count - sum(whole)]:
        whole[index] += 1
    return whole


def interleave(counts: Sequence[int]) -> list[int]:
    """Return an order of rows, stored source after source, that spreads each source evenly.

    Any run of the order holds about its share of each source, and the last k rows are the last rows
    of k sources. Rows of a source keep their order.
    """
    keys = []
    for source, count in enumerate(counts):
        for row in range(count):
            keys.append((Fraction(row + 1, count), source))
    return sorted(range(len(keys)), key=lambda row: keys[row])
