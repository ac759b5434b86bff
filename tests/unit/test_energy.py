"""Energy counters, on files like the system's."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sleb_cli.engine.speed.energy import find_meter


@pytest.fixture
def powercap(tmp_path):
    """Two packages; the zone within the first counts part of it again."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone = tmp_path / name
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text("1000000000\n")
        (zone / "energy_uj").write_text("900000000\n")
    return tmp_path


def test_packages_are_added_up_and_a_full_counter_starts_again(powercap):
    meter = find_meter(torch.device("cpu"), [].append, powercap)
    assert (meter.source, meter.joules()) == ("RAPL", 0)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("950000000")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("990000000")
    assert meter.joules() == pytest.approx(50)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("30000000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("901000000")
    assert meter.joules() == pytest.approx(50 + 80 + 1)


def why_none(device, *powercap):
    """Return the notice that says why there is no meter."""
    heard = []
    assert find_meter(torch.device(device), heard.append, *powercap) is None
    return heard.pop().text


def test_why_there_is_none_is_said(powercap, tmp_path):
    assert f"the processor has no counter in {tmp_path / 'nowhere'}" in why_none("cpu", tmp_path / "nowhere")
    unreadable = powercap / "intel-rapl:0" / "energy_uj"
    unreadable.unlink()
    assert f"this user cannot read {unreadable}" in why_none("cpu", powercap)
    assert "no energy counter for mps" in why_none("mps")


def test_a_gpu_is_asked_by_its_own_number(monkeypatch):
    def unsupported(handle):
        raise RuntimeError("Not Supported")

    # A driver for one GPU, which NVML numbers otherwise than torch; its counter is in millijoules.
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-b7ab": "the GPU"}.get,
        nvmlDeviceGetTotalEnergyConsumption={"the GPU": 5000}.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b7ab"))
    meter = find_meter(torch.device("cuda:0"), [].append)
    assert (meter.source, meter.joules()) == ("NVML", 5)
    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert "NVML reports Not Supported" in why_none("cuda:0")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in why_none("cuda:0")
