"""How much a text repeats itself."""

import re
from collections.abc import Hashable, Sequence
from operator import ne

RUN_LENGTH = 4


def repetition(tokens: Sequence[Hashable]) -> float:
    """Return the share of 4-grams that occurred before: seq-rep-4 of Welleck et al.,
    arXiv:1908.04319, equation 10.
    """
    count = len(tokens) - RUN_LENGTH + 1
    if count <= 0:
        return 0.0
    runs = {tuple(tokens[start : start + RUN_LENGTH]) for start in range(count)}
    return 1 - len(runs) / count


MIN_TIMES = 3
MIN_CHARACTERS = 200
MAX_DIFFERENCES = 0.25
"""In each repeat, on average."""
_LINE_NUMBER = re.compile(r"^(\W*)\d+(?=[.):])", re.MULTILINE)


def is_loop(text: str) -> bool:
    """Whether a text ends in a passage that it says again and again.

    The passage stands at least three times in a row, in 200 characters or more, and of four repeats
    at most one differs in a character. So a word that breaks a loop now and then does not hide it,
    but rows of a table, items in JSON and lines of code are no loop: each says something new. The
    number that begins a line is not new, and one line more may follow the loop.
    """
    text = _LINE_NUMBER.sub(r"\1", text)
    above_last_line = text.rstrip().rpartition("\n")[0].rstrip()
    return _ends_in_repeats(text) or _ends_in_repeats(above_last_line)


def _ends_in_repeats(text: str) -> bool:
    if len(text) < MIN_CHARACTERS:
        return False
    for period in range(1, len(text) // MIN_TIMES + 1):
        end = text[-max(MIN_TIMES * period, MIN_CHARACTERS) :]
        differences = sum(map(ne, end[period:], end[:-period]))
        repeats = len(end) / period - 1
        if differences <= MAX_DIFFERENCES * repeats:
            return True
    return False
