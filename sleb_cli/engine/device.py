"""The machine: which device to use, which data type, and how much memory there is."""

from __future__ import annotations

import gc
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from sleb_cli.engine.process_limits import left_under_limits
from sleb_cli.processes import local_count, local_rank, process_count
from sleb_cli.requests import AUTO
from sleb_cli.units import dtype_in_full, plural
from sleb_plugins import MachineError, UsageError

T = TypeVar("T")

CPU = torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the device, with what torch's allocator holds unused."""
    if device.type == "cpu":  # a container or a batch system may leave less than the machine has
        return min(psutil.virtual_memory().available, left_under_limits())
    backend = torch.get_device_module(device.type)
    if device.type == "mps":
        return int(backend.recommended_max_memory() - backend.current_allocated_memory())
    unused = backend.memory_reserved(device) - backend.memory_allocated(device)
    return int(backend.mem_get_info(device)[0] + unused)


def free_bytes_per_process(device: torch.device) -> int:
    """Return this process's share of the free bytes."""
    # Processes on one machine share its main memory, which is also that of Apple's GPU.
    if device.type in ("cpu", "mps"):
        return free_bytes(device) // local_count()
    return free_bytes(device)


def hint_for_nonfinite(dtype: torch.dtype) -> str:
    """Return a hint for results that are not finite."""
    if dtype == torch.float16:
        return "float16 overflows at 65,504: use --dtype bfloat16 or --dtype float32."
    if dtype == torch.bfloat16:
        return "A more precise data type may help: --dtype float32."
    return "The weights may be damaged: download the model again."


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to an accelerator or else the CPU; check that a named device is available."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    # Of several processes on a machine, each takes an accelerator of its own, unless one is named.
    if kind is not None and process_count() > 1 and name in (AUTO, kind.type):
        name = f"{kind.type}:{local_rank()}"
    if name == AUTO:
        return kind or CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"Unknown device {name!r}.", hint="Use auto, cpu, cuda, cuda:1, mps, xpu or npu."
        ) from error
    if device.type == "cpu":
        return device
    if kind is None or device.type != kind.type:
        raise MachineError(
            f"This machine has no usable {name} device.", hint="Use --device auto, or cpu."
        )
    count = torch.get_device_module(device.type).device_count()
    if (device.index or 0) >= count:
        raise MachineError(
            f"There is no {name}: this machine has {plural(count, f'{device.type} device')}.",
            hint=f"They are numbered from {device.type}:0.",
        )
    return device


def input_device(model: Any) -> torch.device:
    """Return the device that a model takes its tokens on."""
    if not hasattr(model, "_hf_hook"):
        return torch.device(model.device)
    # A device map spreads the model out, and tokens go to the embeddings.
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)


@cache
def has_float64(kind: str) -> bool:
    """Whether devices of this kind compute in float64; Apple's GPUs and some of Intel's do not."""
    with suppress(RuntimeError, TypeError):
        return bool(torch.ones(1, dtype=torch.float64, device=kind).add(1).cpu() == 2)
    return False


def as_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64: on its device, or on the CPU if the device has no float64."""
    if not has_float64(tensor.device.type):
        tensor = tensor.cpu()
    return tensor.double()


_UNITS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"},
          torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith"}}  # fmt: skip
"""The names of a processor's units for each data type."""


@cache
def cpu_units() -> frozenset[str]:
    """Return this processor's units for bfloat16 and float16."""
    if hasattr(torch.cpu, "get_capabilities"):
        supported = torch.cpu.get_capabilities()
    else:  # torch 2.10
        supported = {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "amx_fp16": torch.cpu._is_amx_fp16_supported(),
        }
    known = set().union(*_UNITS.values())
    return frozenset(unit for unit in known if supported.get(unit) is True)


def cpu_dtypes() -> frozenset[torch.dtype]:
    """Return the data types that this processor computes in.

    torch emulates the others, several times slower.
    """
    dtypes = {torch.float32, torch.float64}
    for dtype, any_of in _UNITS.items():
        if cpu_units() & any_of:
            dtypes.add(dtype)
    return frozenset(dtypes)


def parse_dtype(name: str, default: torch.dtype | None) -> torch.dtype:
    """Read the name of a data type; `auto` is the `default`, the checkpoint's own."""
    full = dtype_in_full(name)
    if full == AUTO:
        return default or torch.float32
    dtype: torch.dtype = getattr(torch, full)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that configs and plans use: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def free_memory() -> None:
    """Free the memory of models that nothing refers to any more."""
    gc.collect()  # two models may not fit into memory together
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        torch.get_device_module(kind.type).empty_cache()
