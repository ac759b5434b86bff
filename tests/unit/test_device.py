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


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "_accelerator", lambda: None)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(MachineError, match="no usable cuda device"):
        choose_device("cuda")


def test_any_accelerator_is_chosen_and_its_devices_counted(xpu):
    assert choose_device("auto") == ACCELERATOR
    assert choose_device("xpu:1") == torch.device("xpu:1")
    with pytest.raises(MachineError, match=r"no xpu:2: this machine has 2 xpu devices"):
        choose_device("xpu:2")
    with pytest.raises(MachineError, match="no usable cuda device"):
        choose_device("cuda")


def test_a_name_that_torch_does_not_know_is_a_mistake_of_the_user():
    with pytest.raises(UsageError, match="no device 'gpu'"):
        choose_device("gpu")


def test_free_memory_counts_what_the_allocator_holds_unused(xpu):
    assert free_bytes(torch.device("xpu:0")) == 1_200


def test_without_float64_on_the_device_sums_are_made_on_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_has_float64", lambda kind: kind == "cpu")
    assert as_float64(torch.ones(2)).dtype is torch.float64
    with pytest.raises(NotImplementedError, match="no data"):  # it was asked to leave its device
        as_float64(torch.ones(2, device="meta"))
