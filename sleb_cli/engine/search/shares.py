"""Share measurements out among processes. Pure arithmetic.

Numbers depend on the sequences of a batch, never on which candidates are scored with it. So the
batches are the same for any number of processes, and only whole batches, or the candidates of one,
are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from sleb_cli.engine.process_group import Turn, deal
from sleb_cli.engine.search.journal import Name

Cost = Callable[[int], float]
"""Estimates how long a candidate takes, in any unit."""


def deal_names(names: Iterable[Name], processes: int, cost: Cost | None) -> Iterator[Turn[Name]]:
    """Deal whole batches in turns, or candidates where there are no batches.

    With a `cost`, a last turn of fewer batches than processes is split by candidates.
    """
    batches = [
        list(of_batch)
        for _, of_batch in groupby(names, key=lambda name: name if name[2] is None else name[2])
    ]
    whole = len(batches) - (len(batches) % processes if cost else 0)
    for turn in deal(batches[:whole], processes):
        yield [[name for batch in share for name in batch] for share in turn]
    if cost and whole < len(batches):
        yield split([name for batch in batches[whole:] for name in batch], processes, cost)


def split(names: Sequence[Name], processes: int, cost: Cost) -> Turn[Name]:
    """Cut candidates, in their order, into shares of about equal cost, which may cross batches."""
    costs = [cost(block) for _, block, _ in names if block is not None]
    shares: Turn[Name] = [[] for _ in range(processes)]
    done = 0.0
    for name, candidate_cost in zip(names, costs, strict=True):
        shares[int((done + candidate_cost / 2) / sum(costs) * processes)].append(name)
        done += candidate_cost
    return shares
