"""How long a healing trains, and how much of its budget is used."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sleb_cli.events import Advance
from sleb_cli.requests import DEFAULT_HEAL_MINUTES

FIRST_PORTION_TOKENS, PORTION_TOKENS = 16384, 65536
"""The tokens that a portion trains on, at first and at most.

A large portion has the model write many sequences at once, which is faster; but a large model takes
minutes for it, so portions begin small and double, and the last has as much as the rest of the
budget can train on.
"""


@dataclass(frozen=True)
class HealBudget:
    """When to stop: after minutes or after tokens."""

    minutes: float | None
    tokens: int | None

    @property
    def total(self) -> int:
        """The budget in its own unit, seconds or tokens."""
        return self.tokens if self.tokens is not None else max(1, round(60 * (self.minutes or 0)))

    def portion_tokens(self, portion: int) -> int:
        """Return the tokens that a portion trains on."""
        # A short budget has smaller ones: writing them must leave time for training.
        if self.tokens is not None:
            first = min(FIRST_PORTION_TOKENS, self.tokens)
        else:
            first = max(
                1,
                round(FIRST_PORTION_TOKENS * min(1.0, (self.minutes or 0) / DEFAULT_HEAL_MINUTES)),
            )
        return min(first << portion, PORTION_TOKENS)

    def used(self, seconds: float, tokens: int) -> float:
        """Return how much of the budget is used, in its unit."""
        return float(tokens) if self.tokens is not None else seconds

    def tokens_left(self, seconds: float, tokens: int) -> float:
        """Estimate how many tokens the rest of the budget allows, at the pace so far."""
        left = self.total - self.used(seconds, tokens)
        return left if self.tokens is not None else left * (tokens / max(seconds, 1e-3))


class Clock:
    """Times a healing without its interruptions, and moves its progress bar."""

    def __init__(self, budget: HealBudget, advance: Advance, seconds: float) -> None:
        self._budget, self._advance = budget, advance
        self._began, self._told = time.monotonic() - seconds, 0

    def seconds(self) -> float:
        """Return the seconds since the healing began."""
        return time.monotonic() - self._began

    def tell(self, tokens: int) -> None:
        """Move the progress bar to the share of the budget used after `tokens`."""
        if new := int(self._budget.used(self.seconds(), tokens) - self._told):
            self._advance(new)
            self._told += new
