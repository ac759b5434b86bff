"""Which device is chosen, and what is done where it lacks something."""

import pytest
import torch

from sleb_cli.engine import device as devices
from sleb_cli.engine.device import as_float64, choose_device, free_bytes
from sleb_plugins import MachineError, UsageError

ACCELERATOR = torch.device("xpu")


class Backend:
    """What `torch.xpu` is on a machine with two of Intel's GPUs."""

    @staticmethod
    def device_count():
        return 2

    @staticmethod
    def mem_get_info(device):
        return 1_000, 9_000

    @staticmethod
    def memory_reserved(device):
        return 700

    @staticmethod
    def memory_allocated(device):
        return 500


@pytest.fixture
def xpu(monkeypatch):
    monkeypatch.setattr(devices, "_accelerator", lambda: ACCELERATOR)
    monkeypatch.setattr(devices.torch, "get_device_module", lambda kind: Backend)


@pytest.mark.parametrize(("name", "device"), [("auto", "xpu"), ("xpu:1", "xpu:1"), ("cpu", "cpu")])
def test_any_accelerator_of_torch_is_chosen(xpu, name, device):
    assert choose_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("xpu:2", MachineError, "no xpu:2: this machine has 2 xpu devices"),
        ("cuda", MachineError, "no usable cuda device"),
        ("gpu", UsageError, "no device 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(xpu, name, error, message):
    with pytest.raises(error, match=message):
        choose_device(name)


def test_auto_is_the_cpu_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "_accelerator", lambda: None)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(MachineError, match="no usable cuda device"):
        choose_device("cuda")


def test_free_memory_counts_what_the_allocator_holds_unused(xpu):
    assert free_bytes(torch.device("xpu:0")) == 1_200


def test_without_float64_on_the_device_sums_are_made_on_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_has_float64", lambda kind: kind == "cpu")
    assert as_float64(torch.ones(2)).dtype is torch.float64
    with pytest.raises(NotImplementedError, match="no data"):  # it was asked to leave its device
        as_float64(torch.ones(2, device="meta"))
