"""Which process scores what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb_cli.engine.device import choose_device
from sleb_cli.engine.search.shares import deal_jobs
from sleb_plugins import MachineError


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 11))
def test_every_candidate_of_every_batch_is_scored_once(batches, processes, candidates):
    work = [(batch, list(range(candidates))) for batch in range(batches)]
    turns = list(deal_jobs(work, processes, lambda block: 14.0 - block))
    assert all(len(turn) == processes for turn in turns)
    # In the order of the batches, so that all processes record the same.
    scored = [(batch, block) for turn in turns for share in turn for batch, blocks in share for block in blocks]
    assert scored == [(batch, block) for batch in range(batches) for block in range(candidates)]
    for turn in turns[:-1]:
        assert all(len(share) == 1 for share in turn)


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
