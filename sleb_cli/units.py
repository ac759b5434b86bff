"""Quantities as people write and read them."""

import math
import re

from sleb_plugins.errors import UsageError
from sleb_plugins.formats import format_bytes, format_count

__all__ = ["format_bytes", "format_count", "parse_bytes", "parse_count"]

_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = re.compile(r"(\d*\.?\d+)\s*(?:([kmgtpe])(i?))?b?", re.ASCII)


def parse_count(text: str, option: str) -> float:
    """Read "1.2B", "600M" or "135000000".

    Raises:
        UsageError: `text`, the value of `option`, is no number above 0.
    """
    unit = text[-1:].lower()
    try:
        count = float(text[:-1] if unit in _COUNTS else text) * _COUNTS.get(unit, 1)
    except ValueError:
        count = math.nan
    if not (0 < count < math.inf):
        raise UsageError(f"{option} {text} is not a number of parameters.", hint="Write it like 1.2B or 600M.")
    return count


def parse_bytes(text: str, option: str) -> int:
    """Read "5GB", "500 MB" (powers of ten), "8GiB", "8Gi" (powers of two) or a plain number of bytes.

    Raises:
        UsageError: `text`, the value of `option`, is no number of bytes above 0.
    """
    match = _BYTES.fullmatch(text.strip().lower())
    count = float(match[1]) * (1024 if match[3] else 1000) ** " kmgtpe".index(match[2] or " ") if match else 0.0
    if not 1 <= count < math.inf:
        raise UsageError(f"{option} {text} is not a size.", hint="Write it like 8GiB or 500MB.")
    return int(count)
