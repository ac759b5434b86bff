"""Which device is chosen on a machine without an accelerator; tests/device has one."""

import pytest
import torch

from sleb_cli.engine import device as devices
from sleb_cli.engine.device import choose_device
from sleb_plugins import MachineError, UsageError


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "_accelerator", lambda: None)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_the_cpu_is_chosen(name):
    assert choose_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("cuda", MachineError, "no usable cuda device"), ("gpu", UsageError, "no device 'gpu'")],
)
def test_a_device_that_is_not_there_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        choose_device(name)
