"""The machine and the installed versions, for the record."""

import platform
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import torch

from sleb_cli.plan import EnvironmentRecord
from sleb_cli.units import plural

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


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
    threads = f", {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return f"{chip_name(device)}{threads}"


def chip_name(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    named = (
        None
        if device.type == "cpu"
        else getattr(torch.get_device_module(device.type), "get_device_name", None)
    )
    if named is not None:
        return str(named(device))
    info = Path("/proc/cpuinfo")
    lines = (
        info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    )
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine()


def cpu_governor() -> str | None:
    """Return the name of the rule that sets the processor's clock; None where the system has none."""
    with suppress(OSError):
        return GOVERNOR.read_text(encoding="utf-8").strip() or None
    return None
