"""Quantities as options read them, and as tables, sentences and pictures show them."""

import math
import re
import shlex
from collections.abc import Collection
from fractions import Fraction
from itertools import groupby

from sleb_plugins.errors import UsageError

_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_BYTES = re.compile(r"(\d*\.?\d+)\s*(?:([kmgtpe])(i?))?b?", re.ASCII)


def parse_count(text: str, option: str) -> float:
    """Read "1.2B", "600M" or "135000000"; `option` names it in an error."""
    factor = _COUNTS.get(text[-1:].lower())
    try:
        count = float(text) if factor is None else float(text[:-1]) * factor
    except ValueError:
        count = math.nan
    if not (0 < count < math.inf):
        raise UsageError(
            f"{option} {text} is not a number of parameters.", hint="Write it like 1.2B or 600M."
        )
    return count


def parse_bytes(text: str, option: str) -> int:
    """Read "5GB", "500 MB" (powers of ten), "8GiB", "8Gi" (powers of two) or plain bytes."""
    count = 0.0
    match = _BYTES.fullmatch(text.strip().lower())
    if match:
        number, prefix, is_binary = match.groups()
        base = 1024 if is_binary else 1000
        count = float(number) * base ** " kmgtpe".index(prefix or " ")
    if not 1 <= count < math.inf:
        raise UsageError(f"{option} {text} is not a size.", hint="Write it like 8GiB or 500MB.")
    return int(count)


def parse_ratio(text: str) -> Fraction:
    """Read a ratio exactly, so that 0.2 of 35 blocks is 7: 0.2, 20%, 1/5."""
    try:
        # A float's repr has the same digits, and Fraction("1e-999999999") would compute for hours.
        if "/" in text:
            ratio = Fraction(text)
        elif text.endswith("%"):
            ratio = Fraction(repr(float(text[:-1]))) / 100
        else:
            ratio = Fraction(repr(float(text)))
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio < 1:
        raise UsageError(
            f"The ratio {text} is not between 0 and 1.",
            hint="0.2 or 20% removes a fifth of the blocks.",
        )
    return ratio


def dtype_in_full(text: str) -> str:
    """Return the full name of a data type: bfloat16 for bf16."""
    full = _SHORT.get(text, text)
    if full not in _DTYPES:
        raise UsageError(f"Unknown data type {text!r}.", hint=f"Choose {', '.join(_DTYPES)}.")
    return full


def format_count(number: float) -> str:
    """Write a number of parameters: 134.5M, 1.19B."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.3g}B" if number < 10 else f"{number:.4g}B"


def format_bytes(count: float) -> str:
    """Write a number of bytes, in powers of ten: 98.4 MB, 2.38 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spans(blocks: Collection[int]) -> str:
    """Write the blocks in order, with runs of three or more shortened: 3, 10-14."""
    parts: list[str] = []
    # In a run, a block minus its index is constant.
    for _, numbered in groupby(enumerate(sorted(blocks)), lambda pair: pair[1] - pair[0]):
        run = [block for _, block in numbered]
        if len(run) > 2:
            parts.append(f"{run[0]}-{run[-1]}")
        else:
            parts += map(str, run)
    return ", ".join(parts)


def format_perplexity(value: float) -> str:
    """Write a perplexity: 14.87, 2,310."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def format_milliseconds(value: float) -> str:
    """Write milliseconds with three digits, or seconds: 4.21 ms, 312 ms, 1.85 s."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    if value >= 100:
        return f"{value:.0f} ms"
    if value >= 10:
        return f"{value:.1f} ms"
    return f"{value:.2f} ms"


def format_seconds(value: float) -> str:
    """Write seconds: 48 s, 12 min, 3.2 h."""
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def format_share(share: float, *, signed: bool = False) -> str:
    """Write a share in percent, with one decimal below 100%: 93.4%, +212%."""
    sign = "+" if signed else ""
    digits = 1 if abs(share) < 0.9995 else 0
    return f"{share:{sign}.{digits}%}"


def format_change(change: float) -> str:
    """Write a relative change: +39.0%, -2.1%, or 14.3x from 200% on."""
    if change < 2:
        return format_share(change, signed=True)
    factor = 1 + change
    return f"{factor:.3g}x" if factor < 99.95 else f"{factor:,.0f}x"


def format_probability(value: float) -> str:
    """Write a p-value: 0.031, < 0.001."""
    if value < 0.001:
        return "< 0.001"
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def in_shell(name: str) -> str:
    """Quote a file name for a shell, so that no program takes it for an option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: 1 block, 1,200 items."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
