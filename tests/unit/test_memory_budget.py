"""How a search fits into memory."""

from dataclasses import replace

import pytest
import torch

from sleb_cli.engine import device
from sleb_cli.engine.forward.memory_budget import (
    Footprint,
    MemoryBudget,
    available_memory,
    resolve_memory_budget,
    settings_for,
)
from sleb_plugins import MachineError

FOOTPRINT = Footprint(branch=1_000, block=10_000, logits=100_000, scored=0)


def fit(available, batch=None, sequences=16, length=512, min_batches=1):
    shape = {"candidates": 30, "sequences": sequences, "length": length, "batch": batch}
    shape |= {"min_batches": min_batches}
    return resolve_memory_budget(available, FOOTPRINT, settings_for(torch.device("cpu")), **shape)


def test_with_plenty_a_batch_fills_the_device_and_all_candidates_share_a_walk():
    found = fit(10**12)
    assert (found.sequences, found.positions, found.branches) == (4, 256, 30)
    assert found.kept > 1000


def test_a_batch_holds_at_least_one_sequence_and_at_most_all():
    assert fit(10**12, length=4096).sequences == 1
    assert fit(10**12, length=8, sequences=3).sequences == 3


def test_a_race_has_many_batches_but_none_too_small_for_the_device():
    assert fit(10**12, sequences=128, length=256, min_batches=32).sequences == 4
    assert fit(10**12, sequences=24, length=64, min_batches=32).sequences == 4
    assert fit(10**12, sequences=16, length=2048, min_batches=32).sequences == 1


def test_with_less_fewer_candidates_share_a_walk_but_the_batch_is_the_same():
    found = fit(70_000_000)
    assert (found.sequences, found.positions) == (4, 256)
    assert 1 < found.branches < 30
    assert found.kept == 0


def test_with_little_the_head_and_then_the_batch_give_way():
    assert fit(16_000_000) == MemoryBudget(sequences=2, positions=16, branches=2, kept=0)
    assert fit(9_000_000) == MemoryBudget(sequences=1, positions=16, branches=2, kept=0)


def test_what_a_metric_widens_counts_up_to_what_is_widened_at_a_time():
    settings = replace(settings_for(torch.device("cpu")), widened_bytes=4 << 20)
    shape = {"candidates": 30, "sequences": 16, "length": 512, "batch": None}
    scored = replace(FOOTPRINT, scored=1_000_000)
    # Of 24 MiB at most, and 1 MB a position below that: 16 positions take 16 MB.
    assert resolve_memory_budget(40_000_000, FOOTPRINT, settings, **shape).positions == 128
    assert resolve_memory_budget(40_000_000, scored, settings, **shape).sequences == 2
    assert resolve_memory_budget(10**12, scored, settings, **shape).positions == 256


def test_what_cannot_fit_is_said_before_any_work():
    with pytest.raises(
        MachineError, match=r"1 sequences of 512 tokens need 8\.\d+ MB beside the model, but may take only 5 MB"
    ):
        fit(5_000_000)


def test_a_batch_that_the_user_chose_is_kept_or_refused():
    assert fit(10**12, batch=5).sequences == 5
    with pytest.raises(MachineError, match=r"2 sequences of 512 tokens need .* may take only 9 MB"):
        fit(9_000_000, batch=2)


def test_when_memory_ends_the_least_costly_goes_first_until_nothing_is_left():
    found = MemoryBudget(sequences=2, positions=32, branches=4, kept=50)
    seen = []
    while (found := found.halved()) is not None:
        seen.append(found)
    assert seen == [
        MemoryBudget(2, 32, 2, 0), MemoryBudget(2, 32, 1, 0), MemoryBudget(2, 16, 1, 0), MemoryBudget(1, 16, 1, 0),
    ]  # fmt: skip


def test_what_the_user_said_counts():
    assert available_memory(torch.device("cpu"), "1.5 GB") == 1_500_000_000


def test_a_cpu_is_never_filled(monkeypatch):
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    monkeypatch.setattr(device, "left_under_limits", lambda: 600)
    assert available_memory(torch.device("cpu"), None) == 300
