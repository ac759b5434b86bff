"""The machine: which device to use, which data type, and how much memory there is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from sleb_plugins import MachineError, UsageError

CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the device; a container may leave a process less than the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """Return the free bytes in the control group of this process; without a limit, more than any machine has."""
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((CONTROL_GROUP / "memory.current").read_text())
        held = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63
    reclaimable = int(held.get("file", 0)) - int(held.get("shmem", 0))
    return max(0, limit - used + reclaimable)


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def choose_device(name: str) -> torch.device:
    """Resolve `auto`, or check that the named device is available.

    Raises:
        UsageError: there is no such kind of device.
        MachineError: this machine, or this build of torch, does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"There is no device {name!r}.", hint="Devices are auto, cpu, cuda, cuda:1, mps.") from error
    if not available.get(device.type, False):
        raise MachineError(f"This machine has no usable {name} device.", hint="Use --device auto, or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA devices.",
            hint="They are numbered from cuda:0.",
        )
    return device


def choose_dtype(name: str, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve `auto`: the checkpoint's `own` data type, but bfloat16 for float16 on a CPU, where float16 is slow.

    Raises:
        UsageError: there is no such data type.
    """
    if name == "auto":
        own = own or torch.float32
        return torch.bfloat16 if own is torch.float16 and device.type == "cpu" else own
    full = _SHORT.get(name, name)
    if full not in _DTYPES:
        raise UsageError(f"There is no data type {name!r}.", hint=f"Choose auto, {', '.join(_DTYPES)}.")
    return _DTYPES[full]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that configs and plans use: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def free_memory() -> None:
    """Free the memory of models that nothing refers to any more, since two models may not fit together."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OutOfMemory(MachineError):
    """The device is out of memory; smaller pieces may still fit."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that the device is out of memory; MPS and CPU have no class of their own for it."""
    messages = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
    )


@contextmanager
def translate_out_of_memory(message: str, hint: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into one that says what did not fit.

    Raises:
        OutOfMemory: the body ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(message, hint=hint) from error
