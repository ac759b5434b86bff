"""Which process scores what. Pure arithmetic.

Numbers depend on the sequences of a batch, never on which candidates are scored with it. So batches are those of a
single process, and only whole batches, or the candidates of one, are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from sleb_cli.engine.forward.passes import Job
from sleb_cli.engine.process_group import Turn, deal

T = TypeVar("T")


def at_once(turns: Iterable[Turn[T]]) -> list[Turn[T]]:
    """Join all turns into one, if there are any."""
    joined = [[item for share in shares for item in share] for shares in zip(*turns, strict=True)]
    return [joined] if joined else []


def deal_jobs(jobs: Sequence[Job], processes: int, cost: Callable[[int], float]) -> Iterator[Turn[Job]]:
    """Deal whole batches in turns; those that are left, fewer than there are processes, are split by candidates."""
    whole = len(jobs) - (len(jobs) % processes if all(candidates for _, candidates in jobs) else 0)
    yield from deal(jobs[:whole], processes)
    if whole < len(jobs):
        yield split(jobs[whole:], processes, cost)


def split(jobs: Sequence[Job], processes: int, cost: Callable[[int], float]) -> Turn[Job]:
    """Cut batches with candidates into one share for each process, in their order, each of about the same cost.

    `cost` takes a candidate. A process may get the last candidates of one batch and the first of the next.
    """
    total, done = sum(cost(block) for _, candidates in jobs for block in candidates), 0.0
    shares: list[dict[int, list[int]]] = [{} for _ in range(processes)]
    for batch, candidates in jobs:
        for block in candidates:
            share = shares[int((done + cost(block) / 2) / total * processes)]
            share.setdefault(batch, []).append(block)
            done += cost(block)
    return [list(share.items()) for share in shares]
