"""Scores of spans of blocks, by the hidden states that enter and leave them in one walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sleb_cli.engine.forward.fork import BatchWalk

Span = tuple[int, int]
"""The first and the last of consecutive blocks."""

ScoreStates = Callable[[Tensor, Tensor, Tensor | None], list[float]]
"""Takes the states that enter and leave a span, [sequences, positions, hidden size], and a mask of
the positions that count (None: all); returns each sequence's score.
"""


@dataclass
class SpanScores:
    """The scores of one micro-batch's sequences, by span, from the states that enter and leave it.

    Spans begin and end with a candidate and have up to `longest` blocks.
    """

    candidates: Sequence[int]
    longest: int
    score: ScoreStates
    mask: Tensor | None = None
    found: dict[Span, list[float]] = field(default_factory=dict, init=False)
    _entered: dict[int, Tensor] = field(default_factory=dict, init=False)
    """The states that entered the last candidates."""

    def add(self, block: int, entering: Tensor, leaving: Tensor) -> None:
        """Score the spans that end with this block, if it is a candidate."""
        if block not in self.candidates:
            return
        self._entered[block] = entering
        for first in list(self._entered):
            if block - first < self.longest:
                self.found[first, block] = self.score(self._entered[first], leaving, self.mask)
            else:
                del self._entered[first]


@dataclass(eq=False)
class SpansWalk(BatchWalk):
    """A batch in the model as it stands, while its spans are scored."""

    spans: SpanScores

    def __post_init__(self) -> None:
        self.hidden = self.calls[0].entering

    def advance(self, block: int) -> None:
        """Run `block`, and score the spans that end with it."""
        if block not in self.removed:
            leaving = self.run(block, self.hidden)
            self.spans.add(block, self.hidden, leaving)
            self.hidden = leaving
