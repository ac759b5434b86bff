"""The machine and the installed versions, for the record."""

import platform
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import torch

from sleb_cli.plan import EnvironmentRecord
from sleb_cli.units import plural


def environment_record(
    plugins: dict[str, str], device: torch.device, seconds: float
) -> EnvironmentRecord:
    """Describe where a search ran and how long it took."""
    return EnvironmentRecord(
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=version("transformers"),
        platform=platform.platform(),
        processor=processor_name(device),
        plugins=plugins,
        started=(datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
    )


def processor_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of threads."""
    name = chip_name(device)
    if device.type == "cpu":
        return f"{name}, {plural(torch.get_num_threads(), 'thread')}"
    return name


def chip_name(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    backend = torch.get_device_module(device.type)
    if device.type != "cpu" and hasattr(backend, "get_device_name"):
        return str(backend.get_device_name(device))
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_governor() -> str | None:
    """Return the rule that sets the processor's clock; None where the system has none."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    with suppress(OSError):
        return governor.read_text(encoding="utf-8").strip() or None
    return None
