"""`sleb --version`: what a report of a bug needs to say about the installation and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from sleb_cli.plugin_manager import third_party_plugins
from sleb_cli.units import format_bytes
from sleb_cli.version import __version__
from sleb_plugins.errors import without_secrets


def describe_installation() -> Iterator[str]:
    """Yield one line for each part."""
    yield f"sleb {__version__}"
    yield from (f"plugin {plugin}" for plugin in third_party_plugins())
    yield f"Python {platform.python_version()}, {platform.platform()}"
    try:
        yield from (
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")
        )
        yield from _devices()
    except Exception as error:  # whatever is broken here is why the report is read
        yield without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))


def _devices() -> Iterator[str]:
    import torch

    from sleb_cli.engine.device import CPU, cpu_units, free_bytes
    from sleb_cli.engine.environment import chip_name

    units = ", ".join(sorted(cpu_units())) or "no units for bfloat16 or float16"
    yield f"cpu: {chip_name(CPU)} ({units}), {format_bytes(free_bytes(CPU))} free"
    for number in (
        range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    ):
        device = torch.device(str(torch.accelerator.current_accelerator()), number)
        yield f"{device}: {chip_name(device)}, {format_bytes(free_bytes(device))} free"
