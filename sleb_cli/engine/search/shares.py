"""Measurements are shared out among the processes. Pure arithmetic.

Numbers depend on the sequences of a batch, never on which candidates are scored with it. So the
batches are the same for any number of processes, and only whole batches, or the candidates of one,
are shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sleb_cli.engine.process_group import ProcessGroup, Turn, deal
from sleb_cli.engine.search.journal import Name


def own_shares(
    names: Sequence[Name],
    group: ProcessGroup,
    costs: Mapping[int, float] | None = None,
    *,
    at_once: bool = False,
) -> list[list[Name]]:
    """Return this process's measurements for each turn; after a turn, all exchange their scores.

    `names` come batch by batch. `costs` say how long each candidate takes, in any unit: with them,
    batches that are too few for all processes are split by candidates. `at_once` makes one turn of
    all.
    """
    shares = [turn[group.rank] for turn in _deal_batches(names, group.size, costs)]
    if at_once and shares:
        return [[name for share in shares for name in share]]
    return shares


def _deal_batches(
    names: Sequence[Name], processes: int, costs: Mapping[int, float] | None
) -> list[Turn[Name]]:
    batches: dict[object, list[Name]] = {}
    for name in names:
        _, _, batch = name
        key = name if batch is None else batch  # a measurement on no batch is dealt by itself
        batches.setdefault(key, []).append(name)
    to_deal = list(batches.values())
    to_split: list[Name] = []
    if costs:
        for _ in range(len(to_deal) % processes):
            to_split = to_deal.pop() + to_split
    turns: list[Turn[Name]] = []
    for turn in deal(to_deal, processes):
        turns.append([share[0] if share else [] for share in turn])
    if costs and to_split:
        turns.append(_split(to_split, processes, costs))
    return turns


def _split(names: Sequence[Name], processes: int, costs: Mapping[int, float]) -> Turn[Name]:
    """Cut candidates, in their order, into shares of about equal cost, which may cross batches."""
    shares: Turn[Name] = [[] for _ in range(processes)]
    candidates = [block for _, block, _ in names if block is not None]
    total = sum(costs[block] for block in candidates)
    done = 0.0
    for name, block in zip(names, candidates, strict=True):
        middle = done + costs[block] / 2
        shares[int(middle / total * processes)].append(name)
        done += costs[block]
    return shares
