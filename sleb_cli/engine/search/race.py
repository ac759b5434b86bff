"""Racing: a candidate that is beaten with confidence is scored on no more sequences. Pure arithmetic.

Candidates are compared with the leader sequence by sequence, so that what is hard about a sequence cancels out. The
mean over *all* sequences is what decides, and they are drawn without replacement: the error ends where they end. How
much the differences scatter is alike among candidates, so each one's own variance, unreliable while little has been
seen, is moderated by the median of all (as in Smyth, "Linear models and empirical Bayes methods", SAGMB 2004).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from sleb_cli.engine.search.choices import Outcome
from sleb_cli.plan import DropRecord, RaceRecord

ERROR = 0.05
"""How often a step lets its true winner drop out at most, as far as differences are normal."""

LOOKS = 32
"""Into about so many batches the sequences of a race are cut: after each, somebody may drop out."""

# The median variance of all contenders counts as so many sequences.
PRIOR = 8


@dataclass
class Race:
    """One step's candidates, and each one's scores so far, sequence by sequence in the same order.

    `looks` is how often `drop_beaten` will be asked; so many `winners` are wanted.
    """

    sequences: int
    looks: int
    scores: dict[int, list[float]]
    dropped: dict[int, DropRecord] = field(default_factory=dict)
    winners: int = 1

    @property
    def contenders(self) -> list[int]:
        """Who is still in the race, in the order of the blocks."""
        return [block for block in self.scores if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """How many evaluations of one candidate on one sequence this step takes, if nobody else drops out."""
        return sum(self.dropped[block].sequences if block in self.dropped else self.sequences for block in self.scores)

    def add(self, block: int, scores: Sequence[float]) -> None:
        """Take in what a contender scored on the next sequences."""
        self.scores[block] += scores

    def ranking(self) -> list[int]:
        """Give the contenders, the best first."""
        return sorted(self.contenders, key=lambda block: (self.mean(block), block))

    def mean(self, block: int) -> float:
        """Give the mean score so far."""
        return math.fsum(self.scores[block]) / len(self.scores[block])

    def drop_beaten(self) -> None:
        """Let those drop out who are behind the last that would win now by more than chance explains."""
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
        """Give the result, when all contenders were scored on all sequences."""
        scores = {block: self.mean(block) for block in self.contenders}
        if not fast:
            return Outcome(scores)
        best, *others = self.ranking()
        margin = scores[others[0]] - scores[best] if others else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))

    def _differences(self, block: int, leader: int) -> list[float]:
        return [theirs - best for theirs, best in zip(self.scores[block], self.scores[leader], strict=True)]


def student_quantile(tail: float, freedom: int) -> float:
    """Give the value that Student's t exceeds with probability `tail` (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(1 - tail)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
