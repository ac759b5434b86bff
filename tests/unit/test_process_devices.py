"""Which process takes which device."""

import pytest
import torch

from sleb_cli.engine.device import choose_device
from sleb_plugins import MachineError


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
