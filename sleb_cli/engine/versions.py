"""`sleb --version`: what a report of a bug needs to say about the installation and the machine."""

from __future__ import annotations

import importlib.metadata
import platform

from sleb_cli.plugin_manager import third_party_plugins
from sleb_cli.units import format_bytes
from sleb_cli.version import __version__
from sleb_plugins.errors import without_secrets


def describe_installation() -> list[str]:
    """Return one line for each part."""
    lines = [f"sleb {__version__}"]
    for plugin in third_party_plugins():
        lines.append(f"plugin {plugin}")
    lines.append(f"Python {platform.python_version()}, {platform.platform()}")
    try:
        for name in ("torch", "transformers"):
            lines.append(f"{name} {importlib.metadata.version(name)}")
        lines += _devices()
    except Exception as error:  # whatever is broken here is why the report is read
        lines.append(without_secrets(" ".join(f"{type(error).__name__}: {error}".split())))
    return lines


def _devices() -> list[str]:
    import torch

    from sleb_cli.engine.device import CPU, cpu_units, free_bytes
    from sleb_cli.engine.environment import chip_name

    units = ", ".join(sorted(cpu_units())) or "no units for bfloat16 or float16"
    lines = [f"cpu: {chip_name(CPU)} ({units}), {format_bytes(free_bytes(CPU))} free"]
    if torch.accelerator.is_available():
        for number in range(torch.accelerator.device_count()):
            device = torch.device(str(torch.accelerator.current_accelerator()), number)
            lines.append(f"{device}: {chip_name(device)}, {format_bytes(free_bytes(device))} free")
    return lines
