"""How a search fits into memory."""

from unittest.mock import Mock

import pytest
import torch

from sleb_cli.engine import device
from sleb_cli.engine.forward.memory_budget import (
    MemoryBudget,
    available_memory,
    resolve_memory_budget,
)
from sleb_cli.engine.forward.memory_needs import Footprint
from sleb_plugins import MachineError

FOOTPRINT = Footprint(branch=1_000, block=10_000, logits=100_000, scored=0)
CPU = torch.device("cpu")


def fit(available, **options):
    tokens = torch.empty(options.pop("sequences", 16), options.pop("length", 512), device=CPU)
    return resolve_memory_budget(available, FOOTPRINT, tokens, candidates=30, **options)


@pytest.mark.parametrize(
    ("shape", "sequences"),
    [
        pytest.param({}, 4, id="fills the device"),
        pytest.param({"length": 4096}, 1, id="at least one"),
        pytest.param({"length": 8, "sequences": 3}, 3, id="at most all"),
        pytest.param({"batch_size": 5}, 5, id="as the user chose"),
        # Many batches for a race, but none too small for the device, or of less than a sequence.
        ({"sequences": 128, "length": 256, "min_batches": 32}, 4),
        ({"sequences": 24, "length": 64, "min_batches": 32}, 4),
        ({"sequences": 16, "length": 2048, "min_batches": 32}, 1),
    ],
)
def test_with_plenty_all_candidates_share_a_walk(shape, sequences):
    found = fit(10**12, **shape)
    assert (found.sequences, found.positions, found.branches) == (sequences, 256, 30)
    assert found.kept_branches > 1000


def test_low_memory_reduces_candidates_then_positions_then_the_batch():
    found = fit(70_000_000)
    assert (found.sequences, found.positions, found.kept_branches) == (4, 256, 0)
    assert 1 < found.branches < 30
    assert fit(16_000_000) == MemoryBudget(sequences=2, positions=16, branches=2, kept_branches=0)
    assert fit(9_000_000) == MemoryBudget(sequences=1, positions=16, branches=2, kept_branches=0)


def test_a_budget_that_is_too_small_is_refused_with_the_bytes_needed():
    needed = r"1 sequences of 512 tokens need 8\.\d+ MB in addition to the model, but only 5 MB may"
    with pytest.raises(MachineError, match=needed):
        fit(5_000_000)
    with pytest.raises(MachineError, match=r"2 sequences of 512 tokens need .* but only 9 MB"):
        fit(9_000_000, batch_size=2)


def test_a_cpu_is_never_filled(monkeypatch):
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: Mock(available=1000))
    monkeypatch.setattr(device, "left_under_limits", lambda: 600)
    assert available_memory(CPU) == 300
    # Processes share the memory of a machine, not that of an accelerator.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(device, "free_bytes", lambda device: 1000)
    assert [available_memory(torch.device(kind)) for kind in ("cpu", "cuda")] == [125, 900]
