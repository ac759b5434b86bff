"""Racing: a candidate is no longer scored once little is at stake. Pure arithmetic.

The mean over *all* sequences decides, and they come in random order, without replacement. At each
look, candidates are compared with the leader, sequence by sequence, which cancels out how hard a
sequence is. One drops out once the loss expected from ignoring it is negligible: s (phi(z) - z (1 -
Phi(z))), where z = d / s, if it is d behind with a standard error s (expected improvement: Jones,
Schonlau, Welch, Efficient Global Optimization, 1998, section 4.1). So rivals far behind need few
sequences, and near ties end early, since it hardly matters which of them goes. Two things make the
most of few sequences:

- From one step to the next, distances change little. So the distances of the step before count as
  well, by their precision, and a candidate that no such change would bring back is not scored.
- The variance of a pair is mixed with the median pair's, and this one with the median pair's at the
  first look.

`tests/benchmarks/race.py` measures what this costs. It fails where a few sequences decide: if
differences are very skewed, or if the true winner scatters several times as much as the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy.special import ndtr

from sleb_cli.engine.search.choices import Outcome, ranking
from sleb_cli.plan import DropRecord, RaceRecord

NEGLIGIBLE = 1 / 400
"""The expected loss at which a candidate drops out, as a share of the median candidate's distance
behind the leader.
"""

DRIFT = 0.35
"""The standard deviation of a candidate's change from one step to the next, as such a share."""

LOOKS = 32
"""About how many batches the sequences of a race are cut into; after some of them, candidates may
drop out.
"""

# One sequence says nothing of chance, two looks at nearly the same sequences say nearly the same,
# and near the end little is saved.
FIRST_LOOK = 2
GROWTH = 1.25
LAST_LOOK = 0.9

PRIOR_FREEDOM = 4
"""The degrees of freedom that the median pair adds to a pair's variance, and the first look to the
median pair's.
"""


@dataclass(frozen=True)
class _Estimate:
    """How far each column's block is behind each row's over all sequences, [blocks, blocks].

    `precision` is the inverse of the variance of that.
    """

    behind: np.ndarray
    precision: np.ndarray


@dataclass
class Race:
    """The race of a step's candidates, in order of blocks; `before` is the previous step's."""

    candidates: Sequence[int]
    sequences: int
    before: Race | None = None
    dropped: dict[int, DropRecord] = field(default_factory=dict, init=False)
    _behind: dict[int, tuple[float, float]] = field(default_factory=dict, init=False)
    """How far each candidate is behind the leader, and the square of its standard error."""
    _spread: float | None = field(default=None, init=False)
    """The variance of the median pair at the first look of the search."""
    _looked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.before is not None:
            self._spread = self.before._spread
            self._behind = dict(self.before._behind)
            known = [block for block in self.candidates if block in self._behind]
            self._look(known, np.empty((len(known), 0)))

    @property
    def contenders(self) -> list[int]:
        """The candidates still in the race, in the order of the blocks."""
        return [block for block in self.candidates if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """The evaluations of a candidate on a sequence in this step if no other drops out."""
        saw = sum(drop.sequences for drop in self.dropped.values())
        return len(self.contenders) * self.sequences + saw

    def drop_beaten(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Drop contenders that are too far behind by all `scores` so far, in order of sequences."""
        # Differences must be numbers.
        blocks = [block for block in self.contenders if fmean(scores[block]) < math.inf]
        seen = len(scores[blocks[0]]) if blocks else 0
        due = any(self._looked < look <= seen for look in look_schedule(self.sequences))
        if due and seen < LAST_LOOK * self.sequences:
            self._looked = seen
            self._look(blocks, np.array([scores[block] for block in blocks]))

    def _look(self, blocks: Sequence[int], scores: np.ndarray) -> None:
        """Drop who is too far behind, given this step's scores so far, [blocks, sequences]."""
        if len(blocks) < 2:
            return
        seen = scores.shape[1]
        estimates = [self._prior(blocks)]
        if seen:
            estimates.append(self._observed(scores))
        combined = _combine(estimates)
        # Each pair is estimated by itself, so no row may be ahead of all; the one that is least
        # behind anyone leads.
        leader = int(np.argmax(combined.behind.min(1)))
        for number, block in enumerate(blocks):
            variance = 1 / combined.precision[leader, number]
            self._behind[block] = (float(combined.behind[leader, number]), float(variance))
        negligible = NEGLIGIBLE * _median_distance(self._behind)
        for block in blocks:
            distance, variance = self._behind[block]
            error = math.sqrt(variance)
            if block != blocks[leader] and expected_improvement(distance, error) < negligible:
                errors = min(distance / error, 1e9) if error else 1e9  # infinity is no JSON
                self.dropped[block] = DropRecord(sequences=seen, behind=distance, errors=errors)

    def _prior(self, blocks: Sequence[int]) -> _Estimate:
        """Estimate by the step before, which knows distances to its leader.

        Their difference is the pair's, and both ends have drifted since.
        """
        known = self.before._behind if self.before else {}
        drift = DRIFT * _median_distance(known)
        unknown = (0.0, math.inf)
        distances, variances = np.array([known.get(block, unknown) for block in blocks]).T
        variance = variances + variances[:, None] + 2 * drift**2
        return _Estimate(distances - distances[:, None], _precision(variance))

    def _observed(self, scores: np.ndarray) -> _Estimate:
        """Estimate by this step's scores so far, [blocks, sequences].

        They are drawn without replacement, so the mean is known exactly once all are seen (the
        finite population correction of Cochran, Sampling Techniques, 1977, section 2.6).
        """
        seen = scores.shape[1]
        freedom = seen - 1
        means = scores.mean(1)
        variance = (scores - scores[:, None]).var(-1, ddof=1)
        # Estimates of a variance scatter as chi-squared does, whose median is about
        # (1 - 2 / (9 freedom))^3 of its mean (Wilson and Hilferty, 1931).
        typical = float(np.median(variance[np.triu_indices(len(scores), 1)]))
        median_pair = typical / (1 - 2 / (9 * freedom)) ** 3
        if not self._spread:
            self._spread = median_pair
        expected = _shrink(median_pair, self._spread, freedom)
        variance = _shrink(variance, expected, freedom) * (1 / seen - 1 / self.sequences)
        return _Estimate(means - means[:, None], _precision(variance))

    def outcome(self, scores: Mapping[int, float]) -> Outcome:
        """Return the outcome, given the score of each survivor over all sequences."""
        order = ranking(scores)
        best = scores[order[0]]
        for block, score in scores.items():
            if score < math.inf:
                self._behind[block] = (score - best, 0.0)
        margin = None
        if len(order) > 1 and scores[order[1]] < math.inf:
            margin = scores[order[1]] - best
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))


def look_schedule(sequences: int) -> list[int]:
    """Return after how many sequences candidates may drop out: each time a quarter more."""
    looks = []
    look = float(FIRST_LOOK)
    while look < LAST_LOOK * sequences:
        looks.append(int(look))
        look *= GROWTH
    return looks


def rounds(batches: Sequence[int], *, few: bool = False) -> list[range]:
    """Cut batches with these numbers of sequences into rounds, after which candidates may drop out.

    With `few`, for models that each round has to read, they end after an eighth of the sequences
    and after half. That scores ahead of most looks, but the same candidates drop out.
    """
    total = sum(batches)
    looks = look_schedule(total)
    seen_by = {0: 0}
    """The sequences seen at the end of each round, which is a number of batches."""
    looked = 0
    seen = 0
    for batch, size in enumerate(batches):
        seen += size
        if seen < LAST_LOOK * total and any(looked < look <= seen for look in looks):
            looked = seen
            seen_by[batch + 1] = seen
    ends = list(seen_by)
    if few:
        chosen = {0}
        for share in (1 / 8, 1 / 2):
            late = [end for end in ends if seen_by[end] / total >= share]
            chosen.add(late[0] if late else ends[-1])
        ends = sorted(chosen)
    return [range(*bounds) for bounds in pairwise([*ends, len(batches)])]


def expected_improvement(behind: float, error: float) -> float:
    """Return the expected lead of a candidate over the leader, 0 where it is behind."""
    if not error:
        return max(0.0, -behind)
    z = behind / error
    return error * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - z * float(ndtr(-z)))


def _combine(estimates: Sequence[_Estimate]) -> _Estimate:
    """Average independent estimates, each weighted by its precision (Cochran, 1954)."""
    precision = sum(estimate.precision for estimate in estimates)
    weighted = sum(estimate.precision * estimate.behind for estimate in estimates)
    return _Estimate(weighted / precision, np.asarray(precision))


def _median_distance(behind: Mapping[int, tuple[float, float]]) -> float:
    distances = [distance for distance, _ in behind.values() if distance > 0]
    return median(distances) if distances else 0.0


def _shrink(variance: Any, towards: float, freedom: int) -> Any:
    return (freedom * variance + PRIOR_FREEDOM * towards) / (freedom + PRIOR_FREEDOM)


def _precision(variance: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = 1 / np.maximum(variance, 1e-30)
    return inverse
