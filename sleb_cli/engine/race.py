"""Racing: a candidate that is beaten with confidence is scored on no more sequences. Pure arithmetic.

Candidates are compared with the leader sequence by sequence, so that what is hard about a sequence cancels out. Three
things make the comparison sharp while little has been seen:

- The mean over *all* sequences is what decides, and they are drawn without replacement: the error ends where they end.
- How much the differences scatter is alike among candidates, so each one's own variance is moderated by the median of
  all, which counts as some sequences more (as in Smyth, "Linear models and empirical Bayes methods", SAGMB 2004).
- How a candidate stood against the leader one removal ago predicts how it stands now. Where that is known for more
  sequences than have been seen now, only the change has to be estimated (the difference estimator of double
  sampling: Cochran, "Sampling Techniques", 1977, chapter 12).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sleb_cli.engine.greedy import Outcome
from sleb_cli.plan import DropRecord, RaceRecord

ERROR = 0.05
"""How often a step may let the true winner drop out, at most, as far as differences are normal."""

LOOKS = 32
"""Into about so many batches the sequences of a race are cut: after each, somebody may drop out."""

# The median variance of all contenders counts as so many sequences.
_PRIOR = 8


@dataclass
class Race:
    """One step's candidates, and each one's scores so far, sequence by sequence in the same order.

    `looks` is how often `drop_beaten` will be asked; `before` holds the scores of the step before, as far as known.
    """

    sequences: int
    looks: int
    scores: dict[int, list[float]]
    before: Mapping[int, Sequence[float]] = field(default_factory=dict)
    dropped: dict[int, DropRecord] = field(default_factory=dict)

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
        """Let those drop out who are behind the leader by more than chance explains."""
        leader, *others = self.ranking()
        seen = len(self.scores[leader])
        if not others or not 2 <= seen < self.sequences:
            return
        leads = {block: self._lead(leader, block) for block in others}
        scatter = statistics.median(lead.variance for lead in leads.values())
        drift = statistics.median(lead.drift for lead in leads.values())
        limit = student_quantile(ERROR / (self.looks * len(leads)), _PRIOR + seen - 1)
        for block, lead in leads.items():
            error = lead.error(scatter, drift, self.sequences)
            if lead.mean > limit * error:
                errors = lead.mean / error if error else math.inf
                self.dropped[block] = DropRecord(sequences=seen, behind=lead.mean, errors=min(errors, 1e9))

    def outcome(self, *, fast: bool) -> Outcome:
        """Give the result, when all contenders were scored on all sequences."""
        scores = {block: self.mean(block) for block in self.contenders}
        if not fast:
            return Outcome(scores)
        best, *others = self.ranking()
        margin = scores[others[0]] - scores[best] if others else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))

    def _lead(self, leader: int, block: int) -> _Lead:
        now = _differences(self.scores[block], self.scores[leader])
        then = _differences(self.before.get(block, ()), self.before.get(leader, ()))
        seen, known = len(now), len(then)
        if known <= seen:
            return _Lead(statistics.fmean(now), seen, seen, statistics.variance(now), 0.0)
        changes = _differences(now, then)
        mean = statistics.fmean(then) + statistics.fmean(changes)
        return _Lead(mean, seen, known, statistics.variance(then), statistics.variance(changes))


@dataclass(frozen=True)
class _Lead:
    """How far the leader is ahead: estimated from `seen` sequences now and, one removal ago, `known` sequences."""

    mean: float
    seen: int
    known: int
    variance: float
    drift: float

    def error(self, scatter: float, drift: float, total: int) -> float:
        """Give the standard error of the mean over all sequences, variances moderated by those of all contenders."""
        between = _moderate(self.variance, scatter, self.known) * (1 / self.known - 1 / total)
        within = _moderate(self.drift, drift, self.seen) * (1 / self.seen - 1 / self.known)
        return math.sqrt(between + within)


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [theirs - ours for theirs, ours in zip(left, right, strict=False)]


def _moderate(variance: float, usual: float, count: int) -> float:
    return (_PRIOR * usual + (count - 1) * variance) / (_PRIOR + count - 1)


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
