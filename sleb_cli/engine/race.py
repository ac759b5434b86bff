"""Racing: a candidate that is beaten with confidence is scored on no more sequences. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sleb_cli.engine.greedy import Outcome
from sleb_cli.plan import DropRecord, RaceRecord


@dataclass
class Race:
    """One step's candidates, and each one's scores so far, sequence by sequence in the same order."""

    sequences: int
    scores: dict[int, list[float]]
    dropped: dict[int, DropRecord] = field(default_factory=dict)

    @property
    def contenders(self) -> list[int]:
        """Who is still in the race, in the order of the blocks."""
        return [block for block in self.scores if block not in self.dropped]

    @property
    def evaluations(self) -> int:
        """How many evaluations of one candidate on one sequence this step takes, if nobody else drops out."""
        return sum(self.dropped[block].sequences if block in self.dropped else self.sequences for block in self.scores)

    def add(self, scores: Mapping[int, Sequence[float]]) -> None:
        """Take in what the contenders scored on the next sequences."""
        for block, values in scores.items():
            self.scores[block] += values

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
        for block in others:
            differences = [theirs - best for theirs, best in zip(self.scores[block], self.scores[leader], strict=True)]
            behind, errors = _lead(differences, self.sequences)
            if seen >= 4 and errors > 4:
                self.dropped[block] = DropRecord(sequences=seen, behind=behind, errors=errors)

    def outcome(self, *, fast: bool) -> Outcome:
        """Give the result, when all contenders were scored on all sequences."""
        ranking = self.ranking()
        scores = {block: self.mean(block) for block in self.contenders}
        if not fast:
            return Outcome(scores)
        margin = scores[ranking[1]] - scores[ranking[0]] if len(ranking) > 1 else None
        return Outcome(scores, RaceRecord(margin=margin, dropped=self.dropped))


def _lead(differences: Sequence[float], total: int) -> tuple[float, float]:
    """Give the mean of paired differences, and how many standard errors it is above 0."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, 0.0
    error = statistics.stdev(differences) / math.sqrt(len(differences)) * math.sqrt(1 - len(differences) / total)
    return mean, mean / error if error > 0 else math.copysign(math.inf, mean)
