"""`sleb env`: what a report of a bug needs to say about the machine and the installation.

It is read where something is broken, so torch is imported inside, and a part that cannot be read is a line of the
report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from sleb_cli.plugin_manager import Registry
from sleb_cli.results import AcceleratorRecord, EnvResult
from sleb_cli.version import __version__
from sleb_plugins.errors import without_secrets

T = TypeVar("T")

PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "datasets", "lm-eval", "pluggy", "safetensors", "typer", "rich"
)  # fmt: skip


def describe_environment(plugins: Callable[[], Registry], cache: Callable[[], Path]) -> EnvResult:
    """Describe this machine, what is installed, and the cache, without the user's name and without secrets."""
    problems: dict[str, list[str]] = {}

    def read(what: str, value: Callable[[], T], otherwise: T) -> T:
        try:
            return value()
        except Exception as error:  # whatever is broken here is why the report is read
            problems.setdefault(_public(f"{type(error).__name__}: {error}"), []).append(what)
            return otherwise

    # What cannot be imported is a part of the report.
    torch, device, environment = (
        partial(importlib.import_module, name)
        for name in ("torch", "sleb_cli.engine.device", "sleb_cli.engine.environment")
    )
    registry = read("plugins", plugins, Registry((), ()))
    failed = [f"{failure.plugin}: {failure.reason}" for failure in registry.failures]
    return EnvResult(
        schema_version=1,
        sleb_version=__version__,
        kind="env",
        python=platform.python_version(),
        packages={name: read(name, partial(_version, name), None) for name in PACKAGES},
        platform=platform.platform(),
        processor=read("processor", lambda: environment().chip_name(device().CPU), platform.machine()),
        instructions=read("instructions", lambda: str(torch().backends.cpu.get_cpu_capability()), None),
        auto=read("data types", _auto, {}),
        cores=os.cpu_count() or 1,
        threads=read("threads", lambda: torch().get_num_threads(), None),
        accelerators=read("accelerators", lambda: tuple(_accelerators()), ()),
        memory_bytes=read("memory", lambda: psutil.virtual_memory().total, None),
        free_bytes=read("free memory", lambda: device().free_bytes(device().CPU), None),
        cache=read("cache", lambda: _public(str(cache())), None),
        cache_bytes=read("size of the cache", lambda: _size(cache()), None),
        plugins=registry.third_party(),
        failed=tuple(map(_public, (*failed, *registry.collisions))),
        problems=tuple(f"{', '.join(parts)}: {words}" for words, parts in problems.items()),
    )


def _public(text: str) -> str:
    """Return a text on one line, without tokens and without the name of the user's folder."""
    home = os.path.expanduser("~").rstrip("/\\")  # noqa: PTH111  Path.home() raises for a user without one
    return without_secrets(" ".join(text.split()).replace(home or "~", "~"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _auto() -> dict[str, str]:
    """Return, by the data type of a checkpoint, the one that `--dtype auto` computes in, if it fits into memory."""
    import torch

    from sleb_cli.engine.device import choose_device, cpu_dtypes, dtype_name
    from sleb_cli.requests import AUTO

    is_cpu = choose_device(AUTO).type == "cpu"
    emulated = {torch.bfloat16, torch.float16} - cpu_dtypes() if is_cpu else set()
    types = (torch.bfloat16, torch.float16)
    return {dtype_name(own): dtype_name(torch.float32 if own in emulated else own) for own in types}


def _accelerators() -> Iterator[AcceleratorRecord]:
    import torch

    from sleb_cli.engine.device import free_bytes
    from sleb_cli.engine.environment import chip_name

    for number in range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ():
        device = torch.device(str(torch.accelerator.current_accelerator()), number)
        backend: Any = torch.get_device_module(device.type)
        total = backend.recommended_max_memory() if device.type == "mps" else backend.mem_get_info(device)[1]
        yield AcceleratorRecord(
            device=str(device), name=chip_name(device), memory_bytes=int(total), free_bytes=free_bytes(device)
        )


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if it is missing."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
