"""How long a healing trains, and how much of its budget is used."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sleb_cli.events import Advance


@dataclass(frozen=True)
class HealBudget:
    """When to stop: after minutes or after tokens."""

    minutes: float | None
    tokens: int | None

    @property
    def total(self) -> int:
        """The budget in its own unit, seconds or tokens."""
        if self.tokens is not None:
            return self.tokens
        return max(1, round(60 * (self.minutes or 0)))

    def used(self, seconds: float, tokens: int) -> float:
        """Return the seconds used, or the tokens where the budget is tokens."""
        if self.tokens is not None:
            return float(tokens)
        return seconds


class Clock:
    """Times a healing without its interruptions, and moves its progress bar."""

    def __init__(self, budget: HealBudget, advance: Advance, seconds: float) -> None:
        self._budget = budget
        self._advance = advance
        self._began = time.monotonic() - seconds
        self._told = 0

    def seconds(self) -> float:
        """Return the seconds since the healing began."""
        return time.monotonic() - self._began

    def tell(self, tokens: int) -> None:
        """Move the progress bar to the share of the budget used after `tokens`."""
        new = int(self._budget.used(self.seconds(), tokens) - self._told)
        if new:
            self._advance(new)
            self._told += new
