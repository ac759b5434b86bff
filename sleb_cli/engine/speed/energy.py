"""Energy counters: NVML on NVIDIA GPUs, RAPL in the processor, where the system lets us read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sleb_cli.events import Notice, Notify
from sleb_cli.results import EnergySource

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """A counter of energy; `joules` returns what was used since some moment in the past."""

    source: EnergySource
    joules: Callable[[], float]


class NoMeter(Exception):
    """Why energy cannot be measured."""


def find_meter(device: torch.device, notify: Notify, powercap: Path = POWERCAP) -> Meter | None:
    """Return the counter for what computes on this device; None, with a notice that says why, if none can be read."""
    try:
        if device.type == "cpu":
            return Meter("RAPL", _packages(powercap))
        if device.type == "cuda" and torch.version.cuda:
            return Meter("NVML", _gpu(device))
        raise NoMeter(f"sleb has no energy counter for {device.type}")
    except NoMeter as error:
        notify(Notice(f"Energy is not measured: {error}."))
        return None


def _packages(powercap: Path) -> Callable[[], float]:
    """Read the counters of all processor packages, which also count the work of other programs."""
    # Zones within a package are named intel-rapl:0:1, and counted in it.
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1 and _is_package(zone)]
    if not zones:
        raise NoMeter(f"the processor has no counter in {powercap}")
    try:
        ranges = {zone / "energy_uj": int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        last = {file: int(file.read_text()) for file in ranges}
    except (OSError, ValueError) as error:
        raise NoMeter(f"this user cannot read {zones[0] / 'energy_uj'}") from error
    total = 0

    def joules() -> float:
        nonlocal total
        for file, full in ranges.items():
            now = int(file.read_text())
            total += now - last[file] + (full if now < last[file] else 0)  # a full counter starts again at 0
            last[file] = now
        return total / 1e6

    return joules


def _is_package(zone: Path) -> bool:
    """Whether a zone is a package of the processor, and not the whole machine, which includes them."""
    try:
        return (zone / "name").read_text(encoding="utf-8").strip() != "psys"
    except OSError:
        return True


def _gpu(device: torch.device) -> Callable[[], float]:
    try:
        import pynvml
    except ImportError as error:
        raise NoMeter('the package nvidia-ml-py is not installed (install "sleb[energy]")') from error
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch, but not for NVML.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise NoMeter(f"NVML reports {error}") from error
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
