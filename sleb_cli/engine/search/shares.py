"""Which process scores what. Pure arithmetic.

Numbers depend on the sequences of a batch, never on which candidates are scored with it. So batches are those of a
single process, and only whole batches, or the candidates of one, are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sleb_cli.engine.forward.passes import Job
from sleb_cli.engine.process_group import Turn, deal

T = TypeVar("T")

# Halvings of the interval in which the cost of the largest share lies.
PRECISION = 20


@dataclass(frozen=True)
class Costs:
    """About how long a walk takes, in the time of one block: what all candidates share, and what each adds.

    Attributes:
        base: takes the last candidate.
        branch: takes a candidate.
    """

    base: Callable[[int], float]
    branch: Callable[[int], float]


def costs_of_fork(blocks: int, head: float) -> Costs:
    """Return the costs in a model of so many blocks, whose head takes the time of `head` blocks."""
    return Costs(base=float, branch=lambda block: blocks - block - 1 + head)


EQUAL_COSTS = Costs(base=lambda block: 0.0, branch=lambda block: 1.0)
"""Where each candidate takes a pass of its own."""


def at_once(turns: Iterable[Turn[T]]) -> list[Turn[T]]:
    """Join all turns into one, if there are any."""
    joined = [[item for share in shares for item in share] for shares in zip(*turns, strict=True)]
    return [joined] if joined else []


def deal_jobs(jobs: Sequence[Job], processes: int, costs: Costs) -> Iterator[Turn[Job]]:
    """Deal whole jobs in turns; those that are left, fewer than there are processes, are split by their candidates."""
    whole = len(jobs) - (len(jobs) % processes if all(candidates for _, candidates in jobs) else 0)
    yield from deal(jobs[:whole], processes)
    if whole < len(jobs):
        yield split(jobs[whole:], processes, costs)


def split(jobs: Sequence[Job], processes: int, costs: Costs) -> Turn[Job]:
    """Cut jobs into one share for each process, so that the largest share is as small as it can be.

    Shares are contiguous and in the order of the jobs, so a process may have the end of one and the start of the next.
    """
    fits, low = _fill(jobs, float("inf"), costs), 0.0
    high = sum(_cost(candidates, costs) for _, candidates in jobs)
    for _ in range(PRECISION):
        middle = (low + high) / 2
        shares = _fill(jobs, middle, costs)
        if len(shares) <= processes:
            fits, high = shares, middle
        else:
            low = middle
    return [*fits, *([] for _ in range(processes - len(fits)))]


def _cost(candidates: Sequence[int], costs: Costs) -> float:
    return costs.base(candidates[-1]) + sum(map(costs.branch, candidates))


def _fill(jobs: Sequence[Job], limit: float, costs: Costs) -> list[list[Job]]:
    """Fill one share after another up to the limit; each has at least one candidate."""
    shares: list[list[Job]] = [[]]
    full = 0.0
    for batch, candidates in jobs:
        group: list[int] = []
        for block in candidates:
            if (group or shares[-1]) and full + costs.base(block) + costs.branch(block) > limit:
                shares[-1] += [(batch, group)] if group else []
                shares.append([])
                group, full = [], 0.0
            group.append(block)
            full += costs.branch(block)
        shares[-1].append((batch, group))
        full += costs.base(candidates[-1])
    return shares
