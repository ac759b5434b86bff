"""Mixtures of calibration texts: which sources, how much of each, and in which order. Pure arithmetic."""

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
    """Parse "wikitext2:0.5,c4:0.5", or one source without a share. A local file of exactly this name takes precedence.

    Raises:
        UsageError: a share is missing or invalid, the shares do not sum to 1, or a source is named twice.
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
                hint="Write the share of each source: --calibration wikitext2:0.5,c4:0.5.",
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
        raise UsageError(f"{text!r} names {twice[0]} twice.", hint="Name it once, with the sum of its shares.")
    return mixture


def _parse_part(text: str) -> tuple[str, Fraction | None]:
    """Split a source from its share, a number above 0 and at most 1."""
    source, colon, end = text.rpartition(":")
    try:
        share = Fraction(end)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    return (source, share) if colon and 0 < share <= 1 else (text, None)


def divide(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide `count` into whole numbers by shares that sum to 1, rounding up the largest remainders.

    Ties go to the earlier share.
    """
    whole = [math.floor(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: (whole[part] - count * shares[part], part))
    for part in by_remainder[: count - sum(whole)]:
        whole[part] += 1
    return whole


def interleave(counts: Sequence[int]) -> list[int]:
    """Return an order of rows, stored part after part, that spreads each part evenly.

    Any run of the order holds about its share of each part, and the last k rows are the last rows of k parts. Rows of
    the same part keep their order.
    """
    keys = [(Fraction(row + 1, count), part) for part, count in enumerate(counts) for row in range(count)]
    return sorted(range(len(keys)), key=lambda row: keys[row])
