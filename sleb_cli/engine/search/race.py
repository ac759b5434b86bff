"""Racing: stop scoring a candidate once others are clearly ahead. Pure arithmetic.

Candidates are compared in pairs, sequence by sequence, which cancels out how hard a sequence is. The mean over *all*
sequences decides, and they come in random order, without replacement. If the differences of a pair are normal, the
error of their mean so far, over its estimate, is Student's t, whatever the mean over all sequences: the two are
independent. The estimate is from the pair's own variance, so candidates may scatter as they like. By Bonferroni over
looks and pairs, a step drops a true winner with a probability of at most `ERROR`.

Two things are not exact: each look counts only the pairs still in the race, and real differences are not normal. In
simulation `ERROR` still holds, with tails as heavy as those of Student's t with 3 degrees of freedom, because no
look comes after half of the sequences: later, one outlier among those left can decide. It does not hold if differences
are so skewed that a few sequences decide, or come in coarse steps.
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
"""The largest probability that a step drops a true winner, if the differences of each pair are normal."""

LOOKS = 32
"""About how many batches the sequences of a race are cut into; after some of them, candidates may drop out."""

# Few sequences say nothing of chance, and two looks at nearly the same sequences say nearly the same.
FIRST_LOOK = 4
GROWTH = 1.25


@dataclass
class Race:
    """Which of a step's candidates are still scored.

    Attributes:
        candidates: all of them, in the order of the blocks.
        sequences: how many sequences there are.
        winners: how many winners the step needs.
        dropped: the candidates that dropped out.
    """

    candidates: Sequence[int]
    sequences: int
    winners: int = 1
    dropped: dict[int, DropRecord] = field(default_factory=dict)
    _looked: int = field(default=0, init=False)

    @property
    def contenders(self) -> list[int]:
        """The candidates still in the race, in the order of the blocks."""
        return [block for block in self.candidates if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """How many evaluations of one candidate on one sequence this step takes if no other candidate drops out."""
        return sum(drop.sequences for drop in self.dropped.values()) + self.sequences * len(self.contenders)

    def drop_beaten(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Drop each contender behind as many others as there are winners, by more than chance explains.

        `scores` holds those of each contender so far, one per sequence and in the same order.
        """
        blocks = [block for block in self.contenders if fmean(scores[block]) < math.inf]  # differences must be numbers
        if not blocks:
            return
        seen, rivals = len(scores[blocks[0]]), len(blocks) - self.winners
        looks = look_schedule(self.sequences)
        due = [look for look in looks if self._looked < look <= seen]
        if not due or rivals < 1 or 2 * seen >= self.sequences:
            return
        self._looked = seen
        behind, errors = self._compare(np.array([scores[block] for block in blocks]))
        limit = student_quantile(ERROR * len(due) / len(looks) / (self.winners * rivals), seen - 1)
        for block, leads, distances in zip(blocks, behind, errors, strict=True):
            last = np.argsort(-distances)[self.winners - 1]
            if distances[last] > limit:
                distance = min(float(distances[last]), 1e9)
                self.dropped[block] = DropRecord(sequences=seen, behind=float(leads[last]), errors=distance)

    def _compare(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far each row is behind each other one: the mean difference, also in standard errors."""
        differences = scores[:, None] - scores
        behind = differences.mean(-1)
        error = np.sqrt(differences.var(-1, ddof=1) * (1 / scores.shape[1] - 1 / self.sequences))
        certain = np.where(behind > 0, np.inf, 0.0)
        return behind, np.divide(behind, error, out=certain, where=error > 0)

    def outcome(self, scores: Mapping[int, float]) -> Outcome:
        """Return the result, given the score of each survivor over all sequences."""
        best, *others = ranking(scores)
        margin = scores[others[0]] - scores[best] if others and scores[others[0]] < math.inf else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))


def look_schedule(sequences: int) -> list[int]:
    """Return after how many sequences candidates may drop out: each time a quarter more, but fewer than half of all."""
    looks, look = [], float(FIRST_LOOK)
    while 2 * look < sequences:
        looks.append(int(look))
        look *= GROWTH
    return looks


def rounds(batches: Sequence[int], *, few: bool = False) -> list[range]:
    """Cut batches with these numbers of sequences where a race looks: after each round, candidates may drop out.

    A `few` rounds score ahead of most looks, where each round has to read the model: one ends after an eighth of the
    sequences, and one at the last look. Who drops out does not depend on it.
    """
    looks, ends, looked, seen = look_schedule(sum(batches)), [0], 0, 0
    for batch, size in enumerate(batches):
        seen += size
        if 2 * seen < sum(batches) and any(looked < look <= seen for look in looks):
            looked = seen
            ends.append(batch + 1)
    if few:
        early = [end for end in ends if 8 * sum(batches[:end]) >= sum(batches)]
        ends = sorted({0, *early[:1], ends[-1]})
    return [range(*bounds) for bounds in pairwise([*ends, len(batches)])]


def student_quantile(tail: float, freedom: int) -> float:
    """Return the value that Student's t with `freedom` degrees of freedom exceeds with probability `tail`."""
    return -float(stdtrit(freedom, tail))
