"""Racing: stop scoring a candidate once it is clearly behind. Pure arithmetic.

Each candidate is compared with the leader sequence by sequence, which cancels out how hard a sequence is. The winner is
decided by the mean over *all* sequences, which are drawn without replacement, so the standard error shrinks to 0 at the
last one. The differences scatter about equally for all candidates, so a candidate's own variance, unreliable after few
sequences, is moderated by the median of all (as in Smyth, "Linear models and empirical Bayes methods", SAGMB 2004).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.special import stdtrit

from sleb_cli.engine.search.choices import Outcome
from sleb_cli.plan import DropRecord, RaceRecord

ERROR = 0.05
"""The largest probability that a step drops its true winner, provided that the differences are normal."""

LOOKS = 32
"""About how many batches the sequences of a race are cut into; after each, candidates may drop out."""

# How many sequences the median variance of all contenders counts as.
PRIOR = 8


@dataclass
class Race:
    """The candidates of one step, and the scores of each so far, one per sequence and in the same order.

    Attributes:
        sequences: how many sequences there are.
        looks: how often `drop_beaten` will be called.
        scores: the scores of each candidate.
        dropped: the candidates that dropped out.
        winners: how many winners the step needs.
    """

    sequences: int
    looks: int
    scores: dict[int, list[float]]
    dropped: dict[int, DropRecord] = field(default_factory=dict)
    winners: int = 1

    @property
    def contenders(self) -> list[int]:
        """The candidates still in the race, in the order of the blocks."""
        return [block for block in self.scores if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """How many evaluations of one candidate on one sequence this step takes if no other candidate drops out."""
        return sum(self.dropped[block].sequences if block in self.dropped else self.sequences for block in self.scores)

    def add(self, block: int, scores: Sequence[float]) -> None:
        """Add a contender's scores on the next sequences."""
        self.scores[block] += scores

    def ranking(self) -> list[int]:
        """Return the contenders, best first."""
        return sorted(self.contenders, key=lambda block: (self.mean(block), block))

    def mean(self, block: int) -> float:
        """Return the mean score so far."""
        return math.fsum(self.scores[block]) / len(self.scores[block])

    def drop_beaten(self) -> None:
        """Drop the contenders that are behind the last current winner by more than chance explains."""
        ranking = self.ranking()
        leader, others = ranking[: self.winners][-1], ranking[self.winners :]
        seen = len(self.scores[leader])
        if not others or not 2 <= seen < self.sequences:
            return
        differences = {block: self._differences(block, leader) for block in others}
        usual = statistics.median(statistics.variance(values) for values in differences.values())
        limit = student_quantile(ERROR / (self.looks * len(others)), PRIOR + seen - 1)
        for block, values in differences.items():
            variance = (PRIOR * usual + (seen - 1) * statistics.variance(values)) / (PRIOR + seen - 1)
            error = math.sqrt(variance * (1 / seen - 1 / self.sequences))
            behind = statistics.fmean(values)
            if behind > limit * error:
                errors = behind / error if error else math.inf
                self.dropped[block] = DropRecord(sequences=seen, behind=behind, errors=min(errors, 1e9))

    def outcome(self, *, fast: bool) -> Outcome:
        """Return the result, after all contenders were scored on all sequences."""
        scores = {block: self.mean(block) for block in self.contenders}
        if not fast:
            return Outcome(scores)
        best, *others = self.ranking()
        margin = scores[others[0]] - scores[best] if others else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))

    def _differences(self, block: int, leader: int) -> list[float]:
        return [theirs - best for theirs, best in zip(self.scores[block], self.scores[leader], strict=True)]


def student_quantile(tail: float, freedom: int) -> float:
    """Return the value that Student's t with `freedom` degrees of freedom exceeds with probability `tail`."""
    return -float(stdtrit(freedom, tail))
