"""Energy counters: NVML on NVIDIA GPUs, RAPL in the processor, where the system lets us read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from sleb_cli.results import EnergySource
from sleb_plugins import MachineError

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of energy that only grows."""

    source: EnergySource

    def joules(self) -> float:
        """Return the energy since some moment in the past."""


def find_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter:
    """Return the counter for what computes on this device.

    Raises:
        MachineError: there is none, or it cannot be read.
    """
    if device.type == "cpu":
        return RaplMeter(powercap)
    if device.type == "cuda" and torch.version.cuda:
        return NvmlMeter(device)
    raise MachineError(
        f"Energy is not measured: sleb knows no energy counter for {device.type}.", hint="Use another --device."
    )


class RaplMeter:
    """The counters of all processor packages, which also count the work of other programs.

    Raises:
        MachineError: there is none, or this user may not read it.
    """

    source: EnergySource = "RAPL"

    def __init__(self, powercap: Path) -> None:
        # Zones within a package are named intel-rapl:0:1, and counted in it.
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        if not zones:
            raise MachineError(
                f"Energy is not measured: the processor has no counter in {powercap}.", hint="Use another machine."
            )
        try:
            self._ranges = {zone / "energy_uj": int((zone / "max_energy_range_uj").read_text()) for zone in zones}
            self._last = {file: int(file.read_text()) for file in self._ranges}
        except (OSError, ValueError) as error:
            raise MachineError(
                f"Energy is not measured: this user cannot read {zones[0] / 'energy_uj'}.",
                hint="Give this user read access, or run as root.",
            ) from error
        self._total = 0

    def joules(self) -> float:
        """Return the energy since the meter was made; a full counter starts again at 0."""
        for file, full in self._ranges.items():
            now = int(file.read_text())
            self._total += now - self._last[file] + (full if now < self._last[file] else 0)
            self._last[file] = now
        return self._total / 1e6


class NvmlMeter:
    """The counter of one GPU.

    Raises:
        MachineError: the package that reads it is missing, or the GPU has none.
    """

    source: EnergySource = "NVML"

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise MachineError(
                "Energy is not measured: the package nvidia-ml-py is not installed.", hint='Install "sleb[energy]".'
            ) from error
        try:
            pynvml.nvmlInit()
            # CUDA_VISIBLE_DEVICES renumbers devices for torch, but not for NVML.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._nvml: Any = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.joules()
        except pynvml.NVMLError as error:
            raise MachineError(f"Energy is not measured: NVML reports {error}.", hint="Update the driver.") from error

    def joules(self) -> float:
        """Return the energy since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
