"""Which process scores what."""

import pickle
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb_cli.engine.device import choose_device
from sleb_cli.engine.forward import memory_budget
from sleb_cli.engine.process_group import ProcessGroup, deal
from sleb_cli.engine.search.race import look_schedule, rounds
from sleb_cli.engine.search.shares import EQUAL_COSTS, costs_of_fork, deal_jobs, split
from sleb_plugins import MachineError, OutputError

COSTS = costs_of_fork(12, head=2.0)


def cost(share, costs=COSTS):
    return sum(costs.base(candidates[-1]) + sum(map(costs.branch, candidates)) for _, candidates in share)


def work(turns):
    return sorted((batch, block) for turn in turns for share in turn for batch, blocks in share for block in blocks)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 11))
def test_every_candidate_of_every_batch_is_scored_once(batches, processes, candidates):
    jobs = [(batch, list(range(candidates))) for batch in range(batches)]
    turns = list(deal_jobs(jobs, processes, COSTS))
    assert all(len(turn) == processes for turn in turns)
    assert work(turns) == [(batch, block) for batch in range(batches) for block in range(candidates)]
    for turn in turns[:-1]:
        assert all(len(share) == 1 for share in turn)


def test_batches_go_to_the_same_processes_in_every_step():
    jobs = [(batch, [1, 2, 3]) for batch in range(7)]
    turns = list(deal_jobs(jobs, 3, COSTS))
    assert [[share[0][0] for share in turn] for turn in turns[:2]] == [[0, 1, 2], [3, 4, 5]]
    assert [batch for share in turns[2] for batch, _ in share] == [6, 6, 6]
    assert list(deal([4, 5, 6], 2)) == [[[4], [5]], [[6], []]]
    # More processes than candidates leave some idle.
    assert split([(0, [1, 2])], 4, EQUAL_COSTS) == [[(0, [1])], [(0, [2])], [], []]


@pytest.mark.parametrize(("batches", "processes"), [(1, 2), (1, 3), (2, 3), (4, 8), (5, 8)])
@pytest.mark.parametrize("costs", [COSTS, EQUAL_COSTS])
def test_what_is_left_is_split_evenly(batches, processes, costs):
    jobs = [(batch, list(range(1, 11))) for batch in range(batches)]
    shares = split(jobs, processes, costs)
    most = max(costs.base(10) + costs.branch(1), max(map(costs.branch, range(1, 11))))
    assert max(cost(share, costs) for share in shares) <= cost(jobs, costs) / processes + most
    # In the order of the jobs, so that all processes record the same.
    flat = [(batch, block) for share in shares for batch, blocks in share for block in blocks]
    assert flat == [(batch, block) for batch, blocks in jobs for block in blocks]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_rounds_end_where_a_race_looks(batches):
    looks, seen = look_schedule(sum(batches)), list(accumulate(batches, initial=0))
    before_half = [end for end in range(1, len(seen)) if 2 * seen[end] < sum(batches)]
    ends = {end for end in before_half if any(seen[end - 1] < look <= seen[end] for look in looks)}
    cut = rounds(batches)
    assert [batch for part in cut for batch in part] == list(range(len(batches)))
    assert {part.stop for part in cut} == ends | {len(batches)}


def test_alone_a_process_exchanges_nothing():
    group = ProcessGroup()
    assert (group.is_main, group.size) == (True, 1)
    assert group.gather("x") == ["x"]
    assert group.from_main(lambda: 3) == group.one_first(lambda: 3) == 3
    assert list(group.in_turn(iter("ab"))) == [(0, "a"), (0, "b")]


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


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: 1000)
    assert memory_budget.available_memory(torch.device("cpu"), None) == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget.available_memory(torch.device("cpu"), None) == 125
    assert memory_budget.available_memory(torch.device("cuda"), None) == 900
    assert memory_budget.available_memory(torch.device("cpu"), "3kB") == 3000


def test_an_error_can_be_sent_to_another_process():
    error = OutputError("No room.", hint="Make some.")
    error.unsaved = {"a": 1}
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint, again.unsaved) == (OutputError, "No room.", "Make some.", {"a": 1})
