"""Racing: stop scoring a candidate once others are clearly ahead. Pure arithmetic.

Candidates are compared in pairs, sequence by sequence, which cancels out how hard a sequence is. The mean over *all*
sequences decides, and they come in random order, without replacement. A candidate drops out if another leads by more
standard errors than Student's t exceeds by chance, by Bonferroni over looks and pairs, so that a step drops a true
winner with a probability of at most `ERROR`. Two things make the most of few sequences:

- From one step to the next, the differences of a pair hardly change (correlation 0.75 to 0.93 on SmolLM2). So their
  mean is estimated as that of the step before, over all sequences seen there, plus the change on those seen here.
- The variance of a pair is taken as the larger of its own and the median of all pairs. So its own cannot be too small
  by chance, and the quantile has more degrees of freedom.

This is not exact, since each look counts only the pairs still in the race, and real differences are not normal. It
holds in simulation, with tails as heavy as those of Student's t with 3 degrees of freedom, and if one candidate
scatters five times as much as the others; it does not hold if differences are so skewed that a few sequences decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

import numpy as np
from scipy.special import stdtrit

from sleb_cli.engine.search.choices import Outcome, ranking
from sleb_cli.plan import DropRecord, RaceRecord

ERROR = 0.05
"""The largest probability that a step drops a true winner."""

LOOKS = 32
"""About how many batches the sequences of a race are cut into; after some of them, candidates may drop out."""

# Few sequences say nothing of chance, two looks at nearly the same sequences say nearly the same, and near the end
# little is saved.
FIRST_LOOK = 4
GROWTH = 1.25
LAST_LOOK = 0.8

POOLED_FREEDOM = 6
"""How many degrees of freedom other pairs add to the variance of a pair, at most one each."""


@dataclass
class Race:
    """Which of a step's candidates are still scored.

    Attributes:
        candidates: all of them, in the order of the blocks.
        sequences: how many sequences there are.
        before: scores of candidates in the step before, by sequence in the same order, as far as they were scored.
        dropped: the candidates that dropped out.
    """

    candidates: Sequence[int]
    sequences: int
    before: Mapping[int, Sequence[float]] = field(default_factory=dict)
    dropped: dict[int, DropRecord] = field(default_factory=dict)
    _looked: int = field(default=0, init=False)

    @property
    def contenders(self) -> list[int]:
        """The candidates still in the race, in the order of the blocks."""
        return [block for block in self.candidates if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """How many evaluations of one candidate on one sequence this step takes if no other candidate drops out."""
        return sum(map(self.scored, self.candidates))

    def scored(self, block: int) -> int:
        """How many sequences a candidate is scored on if it drops out no more."""
        return self.dropped[block].sequences if block in self.dropped else self.sequences

    def drop_beaten(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Drop each contender that is behind another by more than chance explains.

        `scores` holds those of each contender so far, one per sequence and in the same order.
        """
        blocks = [block for block in self.contenders if fmean(scores[block]) < math.inf]  # differences must be numbers
        if not blocks:
            return
        seen, rivals = len(scores[blocks[0]]), len(blocks) - 1
        looks = look_schedule(self.sequences)
        due = [look for look in looks if self._looked < look <= seen]
        if not due or rivals < 1 or seen >= LAST_LOOK * self.sequences:
            return
        self._looked = seen
        behind, errors = self._compare(blocks, np.array([scores[block] for block in blocks]))
        freedom = seen - 1 + min(POOLED_FREEDOM, math.comb(len(blocks), 2) - 1)
        limit = student_quantile(ERROR * len(due) / len(looks) / rivals, freedom)
        for block, leads, distances in zip(blocks, behind, errors, strict=True):
            rival = np.argmax(distances)
            if distances[rival] > limit:
                distance = min(float(distances[rival]), 1e9)
                self.dropped[block] = DropRecord(sequences=seen, behind=float(leads[rival]), errors=distance)

    def _compare(self, blocks: Sequence[int], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far each row of scores is behind each other one, also in standard errors."""
        seen = scores.shape[1]
        differences = scores[:, None] - scores
        behind, variance = differences.mean(-1), _pooled(differences)
        squared_error = variance * (1 / seen - 1 / self.sequences)
        known, sums = self._known_before(blocks)
        more = known > seen
        if np.triu(more, 1).any():
            # The sample of this step lies within that of the step before (Cochran, Sampling Techniques, chapter 12).
            earlier = np.diff(sums[:, : seen + 1])
            changes = differences - (earlier[:, None] - earlier)
            row = np.arange(len(blocks))
            before = (sums[row[:, None], known] - sums[row, known]) / known
            of_both = variance * (1 / known - 1 / self.sequences) + _pooled(changes, more) * (1 / seen - 1 / known)
            better = more & (of_both < squared_error)
            behind = np.where(better, before + changes.mean(-1), behind)
            squared_error = np.where(better, of_both, squared_error)
        certain = np.where(behind > 0, np.inf, 0.0)
        return behind, np.divide(behind, np.sqrt(squared_error), out=certain, where=squared_error > 0)

    def _known_before(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return on how many sequences both of a pair were scored in the step before, and each block's running sums."""
        sums, known = np.zeros((len(blocks), self.sequences + 1)), np.ones(len(blocks), dtype=int)
        for row, block in enumerate(blocks):
            scores = self.before.get(block, ())
            if scores and fmean(scores) < math.inf:
                known[row] = len(scores)
                sums[row, 1 : len(scores) + 1] = np.cumsum(scores)
        return np.minimum.outer(known, known), sums

    def outcome(self, scores: Mapping[int, float]) -> Outcome:
        """Return the result, given the score of each survivor over all sequences."""
        best, *others = ranking(scores)
        margin = scores[others[0]] - scores[best] if others and scores[others[0]] < math.inf else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))


def look_schedule(sequences: int) -> list[int]:
    """Return after how many sequences candidates may drop out: each time a quarter more."""
    looks, look = [], float(FIRST_LOOK)
    while look < LAST_LOOK * sequences:
        looks.append(int(look))
        look *= GROWTH
    return looks


def rounds(batches: Sequence[int], *, few: bool = False) -> list[range]:
    """Cut batches with these numbers of sequences where a race looks: after each round, candidates may drop out.

    A `few` rounds score ahead of most looks, where each round has to read the model: one ends after an eighth of the
    sequences, and one after half. Who drops out does not depend on it.
    """
    looks, ends, looked, seen = look_schedule(sum(batches)), [0], 0, 0
    for batch, size in enumerate(batches):
        seen += size
        if seen < LAST_LOOK * sum(batches) and any(looked < look <= seen for look in looks):
            looked = seen
            ends.append(batch + 1)
    if few:
        shares = {end: sum(batches[:end]) / sum(batches) for end in ends}
        first = [min((end for end in ends if shares[end] >= least), default=ends[-1]) for least in (1 / 8, 1 / 2)]
        ends = sorted({0, *first})
    return [range(*bounds) for bounds in pairwise([*ends, len(batches)])]


def _pooled(differences: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the variance of each pair's differences, but at least the median of the pairs that are known."""
    variance: np.ndarray = differences.var(-1, ddof=1)
    pairs = np.triu(np.ones_like(variance, dtype=bool) if known is None else known, 1)
    return variance.clip(min=float(np.median(variance[pairs])))


def student_quantile(tail: float, freedom: int) -> float:
    """Return the value that Student's t with `freedom` degrees of freedom exceeds with probability `tail`."""
    return -float(stdtrit(freedom, tail))
