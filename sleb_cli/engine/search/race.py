"""Racing: stop scoring a candidate once little is at stake. Pure arithmetic.

The mean over *all* sequences decides, and they come in random order, without replacement. At each
look, candidates are compared with the leader, sequence by sequence, which cancels out how hard a
sequence is. One drops out once the loss expected from ignoring it is negligible: s (phi(z) - z (1 -
Phi(z))), where z = d / s, if it is d behind with a standard error s (expected improvement: Jones,
Schonlau, Welch, Efficient Global Optimization, 1998, section 4.1). So rivals far behind need few
sequences, and near ties end early, since it hardly matters which of them goes. Two things make the
most of few sequences:

- From one step to the next, distances change little. So the distances of the step before count as
well, by their
  precision, and a candidate that no such change would bring back is not scored at all.
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


@dataclass
class Race:
    """The race of a step's candidates, in the order of the blocks; `before` is the race of the step
    before.
    """

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
            self._spread, self._behind = self.before._spread, dict(self.before._behind)
            known = [block for block in self.candidates if block in self._behind]
            self._look(known, np.empty((len(known), 0)))

    @property
    def contenders(self) -> list[int]:
        """The candidates still in the race, in the order of the blocks."""
        return [block for block in self.candidates if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """The evaluations of a candidate on a sequence that this step takes if no other candidate
        drops out.
        """
        return len(self.contenders) * self.sequences + sum(
            drop.sequences for drop in self.dropped.values()
        )

    def drop_beaten(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Drop each contender that is too far behind; `scores` has all scores so far, in the order
        of the sequences.
        """
        blocks = [
            block for block in self.contenders if fmean(scores[block]) < math.inf
        ]  # differences must be numbers
        seen = len(scores[blocks[0]]) if blocks else 0
        due = any(self._looked < look <= seen for look in look_schedule(self.sequences))
        if due and seen < LAST_LOOK * self.sequences:
            self._looked = seen
            self._look(blocks, np.array([scores[block] for block in blocks]))

    def _look(self, blocks: Sequence[int], scores: np.ndarray) -> None:
        if len(blocks) < 2:
            return
        behind, variance = self._compare(blocks, scores)
        # Each pair is estimated by itself, so no row may be ahead of all; the one that is least
        # behind anyone leads.
        leader = int(np.argmax(behind.min(1)))
        standings = dict(
            zip(
                blocks,
                zip(behind[leader].tolist(), variance[leader].tolist(), strict=True),
                strict=True,
            )
        )
        self._behind |= standings
        negligible = NEGLIGIBLE * _median_distance(self._behind)
        for block, (distance, squared) in standings.items():
            error = math.sqrt(squared)
            if block != blocks[leader] and expected_improvement(distance, error) < negligible:
                errors = min(distance / error, 1e9) if error else 1e9  # infinity is no JSON
                self.dropped[block] = DropRecord(
                    sequences=scores.shape[1], behind=distance, errors=errors
                )

    def _compare(self, blocks: Sequence[int], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Returns how far each column's block is behind each row's over all sequences, and its
        # variance. The step before and this step's scores each estimate it, and count by their
        # precision.
        known = self.before._behind if self.before else {}
        drift = DRIFT * _median_distance(known)
        # The step before knows distances to its leader; their difference is the pair's, and both
        # ends have drifted.
        level, squared = np.array([known.get(block, (0.0, math.inf)) for block in blocks]).T
        precision = _precision(squared + squared[:, None] + 2 * drift**2)
        weighted = precision * (level - level[:, None])
        if seen := scores.shape[1]:
            means, variance = scores.mean(1), (scores - scores[:, None]).var(-1, ddof=1)
            freedom = seen - 1
            # Estimates of a variance scatter as chi-squared does, whose median Wilson and Hilferty
            # approximate.
            median_pair = (
                float(np.median(variance[np.triu_indices(len(blocks), 1)]))
                / (1 - 2 / (9 * freedom)) ** 3
            )
            self._spread = self._spread or median_pair
            variance = _shrink(variance, _shrink(median_pair, self._spread, freedom), freedom)
            # Drawn without replacement: once all sequences are seen, the mean is known exactly.
            new_precision = _precision(variance * (1 / seen - 1 / self.sequences))
            precision, weighted = (
                precision + new_precision,
                weighted + new_precision * (means - means[:, None]),
            )
        return weighted / precision, 1 / precision

    def outcome(self, scores: Mapping[int, float]) -> Outcome:
        """Return the outcome, given the score of each survivor over all sequences."""
        best, *others = ranking(scores)
        self._behind |= {
            block: (score - scores[best], 0.0)
            for block, score in scores.items()
            if score < math.inf
        }
        margin = (
            scores[others[0]] - scores[best] if others and scores[others[0]] < math.inf else None
        )
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))


def look_schedule(sequences: int) -> list[int]:
    """Return the numbers of sequences after which candidates may drop out: each time a quarter
    more.
    """
    looks, look = [], float(FIRST_LOOK)
    while look < LAST_LOOK * sequences:
        looks.append(int(look))
        look *= GROWTH
    return looks


def rounds(batches: Sequence[int], *, few: bool = False) -> list[range]:
    """Cut batches with these numbers of sequences into rounds, after which candidates may drop out.

    With `few`, for models that each round has to read, they end after an eighth of the sequences
    and after half. That scores ahead of most looks, but the same candidates drop out.
    """
    looks, ends, looked, seen = look_schedule(sum(batches)), [0], 0, 0
    for batch, size in enumerate(batches):
        seen += size
        if seen < LAST_LOOK * sum(batches) and any(looked < look <= seen for look in looks):
            looked = seen
            ends.append(batch + 1)
    if few:
        shares = {end: sum(batches[:end]) / sum(batches) for end in ends}
        first = [
            min((end for end in ends if shares[end] >= least), default=ends[-1])
            for least in (1 / 8, 1 / 2)
        ]
        ends = sorted({0, *first})
    return [range(*bounds) for bounds in pairwise([*ends, len(batches)])]


def expected_improvement(behind: float, error: float) -> float:
    """Return the expectation of how far a candidate is ahead of the leader, counting 0 where it is
    behind.
    """
    if not error:
        return max(0.0, -behind)
    z = behind / error
    return error * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - z * float(ndtr(-z)))


def _median_distance(behind: Mapping[int, tuple[float, float]]) -> float:
    return median([distance for distance, _ in behind.values() if distance > 0] or [0.0])


def _shrink(variance: Any, towards: float, freedom: int) -> Any:
    return (freedom * variance + PRIOR_FREEDOM * towards) / (freedom + PRIOR_FREEDOM)


def _precision(variance: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = 1 / np.maximum(variance, 1e-30)
    return inverse
