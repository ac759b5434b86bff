"""Several sources of calibration text at once: which, how much of each, and in which order. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from sleb_plugins import UsageError


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and its share of the sequences."""

    source: str
    share: Fraction


def parse_mixture(text: str) -> tuple[Part, ...]:
    """Read "wikitext2:0.5,c4:0.5"; a source alone is all of it. A local file of that very name comes first.

    Raises:
        UsageError: a share is missing or is none, the shares do not sum to 1, or a source is named twice.
    """
    if Path(text).exists():
        return (Part(text, Fraction(1)),)
    parts = [_parse_part(part.strip()) for part in text.split(",")]
    if len(parts) == 1 and parts[0][1] is None:
        return (Part(text, Fraction(1)),)
    for source, share in parts:
        if share is None or not source:
            raise UsageError(
                f"{source or 'A source'} has no share in the mixture {text!r}.",
                hint="Give each source its share: --calibration wikitext2:0.5,c4:0.5.",
            )
    mixture = tuple(Part(source, share) for source, share in parts if share is not None)
    total = sum(part.share for part in mixture)
    if total != 1:
        raise UsageError(
            f"The shares of {text!r} sum to {float(total):g}, not to 1.", hint="Thirds can be written as 1/3."
        )
    sources = [part.source for part in mixture]
    twice = [source for source in sources if sources.count(source) > 1]
    if twice:
        raise UsageError(f"{text!r} names {twice[0]} twice.", hint="Give it one share.")
    return mixture


def _parse_part(text: str) -> tuple[str, Fraction | None]:
    """Take the share off the end of a source: a number above 0, at most 1."""
    source, colon, end = text.rpartition(":")
    try:
        share = Fraction(end)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    return (source, share) if colon and 0 < share <= 1 else (text, None)


def divide(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide `count` by shares that sum to 1: whole numbers, what is left going to the largest remainders.

    Ties go to who comes first.
    """
    whole = [math.floor(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: (whole[part] - count * shares[part], part))
    for part in by_remainder[: count - sum(whole)]:
        whole[part] += 1
    return whole


def interleave(counts: Sequence[int]) -> list[int]:
    """Give an order for rows that stand part after part in which every part is spread evenly, up to the very end.

    So any stretch of the order has about its share of each part, and the last k rows hold the last row of each of k
    parts. Within a part, rows keep their order.
    """
    keys = [(Fraction(row + 1, count), part) for part, count in enumerate(counts) for row in range(count)]
    return sorted(range(len(keys)), key=lambda row: keys[row])
