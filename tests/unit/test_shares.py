"""Which process scores what."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb_cli.engine.device import choose_device
from sleb_cli.engine.search.race import look_schedule, rounds
from sleb_cli.engine.search.shares import deal_jobs, split
from sleb_plugins import MachineError


def fork_cost(block):
    return 12 - block + 2.0


def equal_cost(block):
    return 1.0


def time_of(share, cost):
    """In the time of a block: the base up to the last candidate of each batch, and each candidate's branch above it."""
    return sum(
        (blocks[-1] if cost is fork_cost else 0) + sum(cost(block) - (cost is fork_cost) for block in blocks)
        for _, blocks in share
    )


def scored(turns):
    return [(batch, block) for turn in turns for share in turn for batch, blocks in share for block in blocks]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 11))
def test_every_candidate_of_every_batch_is_scored_once(batches, processes, candidates):
    work = [(batch, list(range(candidates))) for batch in range(batches)]
    turns = list(deal_jobs(work, processes, fork_cost))
    assert all(len(turn) == processes for turn in turns)
    # In the order of the batches, so that all processes record the same.
    assert scored(turns) == [(batch, block) for batch in range(batches) for block in range(candidates)]
    for turn in turns[:-1]:
        assert all(len(share) == 1 for share in turn)


@pytest.mark.parametrize(("batches", "processes"), [(1, 2), (1, 3), (2, 3), (4, 8), (5, 8), (1, 12)])
@pytest.mark.parametrize(("cost", "most"), [(fork_cost, 10 + 12), (equal_cost, 1)])
def test_what_is_left_is_split_evenly(batches, processes, cost, most):
    """The longest base and branch more than an even share, at most."""
    work = [(batch, list(range(1, 11))) for batch in range(batches)]
    longest = max(time_of(share, cost) for share in split(work, processes, cost))
    assert longest <= time_of(work, cost) / processes + most


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_rounds_end_where_a_race_looks(batches):
    looks, seen = look_schedule(sum(batches)), list(accumulate(batches, initial=0))
    before_half = [end for end in range(1, len(seen)) if 2 * seen[end] < sum(batches)]
    ends = {end for end in before_half if any(seen[end - 1] < look <= seen[end] for look in looks)}
    cut = rounds(batches)
    assert [batch for part in cut for batch in part] == list(range(len(batches)))
    assert {part.stop for part in cut} == ends | {len(batches)}


def test_each_process_takes_an_accelerator_of_its_own(simulate, monkeypatch):
    simulate(memory=2**30)
    assert choose_device("auto") == torch.device("sim")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("sim") == torch.device("sim:1")
    assert choose_device("sim:0") == torch.device("sim:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match="There is no sim:2"):
        choose_device("auto")
