"""How much a text repeats itself."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

# How many tokens make a run that may be repeated.
RUN = 4


def repetition(tokens: Sequence[Hashable]) -> float:
    """Return the share of the runs of 4 tokens that occurred before in the same text: 0 means no repetition.

    That is 1 minus the distinct share of n-grams with n = 4 (seq-rep-4 of Welleck et al., ICLR 2020, arXiv:1908.04319,
    equation 10).
    """
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
