"""How much a text repeats itself."""

from collections.abc import Hashable, Sequence

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
