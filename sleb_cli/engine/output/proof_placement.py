"""Where the two models of a proof run, and in which data type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sleb_cli.atomic import free_space
from sleb_cli.cache import cache_root
from sleb_cli.engine.device import CPU, choose_device, free_memory, has_float64
from sleb_cli.engine.forward.memory_needs import converted_bytes, model_bytes
from sleb_cli.engine.forward.placement import choose_dtype, place_model
from sleb_cli.engine.forward.streaming import require_streamable
from sleb_cli.engine.memory import memory_shortage, shortage
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import DeviceMap, Placement
from sleb_cli.events import ignore
from sleb_cli.requests import AUTO

PEAK_SHARE = 1.2
"""The memory of a proof, relative to the dense model's weights.

The two models are loaded one after the other.
"""

WIDER_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
"""The data type that decides if logits differ."""


@dataclass(frozen=True)
class ProofPlacement(Placement):
    """Where and in which data type the two models of a proof run.

    If the dense model is streamed, accelerate leaves the checkpoint's blocks on the disk, too.

    Attributes:
        too_large: why they cannot run, if so.
    """

    too_large: str | None = None


def place_proof(
    architecture: Architecture,
    cast: torch.dtype | None,
    device_map: DeviceMap | None = None,
    stream: bool | None = None,
) -> ProofPlacement:
    """Choose the fastest device with memory for the dense model, or else for two of its blocks.

    `cast` is the data type of the checkpoint, if not the dense model's. `device_map` and `stream`
    are the user's choices, which take precedence.
    """
    if device_map is not None:
        device = choose_device(AUTO)
        mapped = place_model(architecture, device, AUTO, ignore, device_map=device_map, cast=cast)
        return ProofPlacement(**vars(mapped))
    if stream:
        require_streamable(architecture)
        ways = [True]
    elif stream is False or architecture.is_quantized:
        ways = [False]
    else:
        ways = [False, True]
    return _first_that_fits(architecture, ways, cast)


def place_wider(
    architecture: Architecture, placement: Placement, cast: torch.dtype | None
) -> ProofPlacement | None:
    """Choose where to compare in the next wider data type; None if this model has none.

    A device map is left aside: it was made for weights of another size.
    """
    wider = WIDER_DTYPES.get(placement.dtype)
    if wider is None or architecture.is_quantized:
        return None
    free_memory()
    ways = [True] if placement.stream else [False, True]
    return _first_that_fits(architecture, ways, cast, wider)


def _first_that_fits(
    architecture: Architecture,
    ways: Sequence[bool],
    cast: torch.dtype | None,
    dtype: torch.dtype | None = None,
) -> ProofPlacement:
    """Return the first place without an obstacle, or the last one with its obstacle.

    `ways` are values of `stream`, in order. Without a `dtype`, the device's best is chosen.
    """
    # Only float16 itself overflows as the checkpoint would.
    name = "float16" if cast is torch.float16 else AUTO
    for stream in ways:
        for device in dict.fromkeys([choose_device(AUTO), CPU]):
            lack = partial(_memory_shortage, architecture, device, stream=stream)
            chosen = dtype or choose_dtype(architecture, name, device, lack, ignore, cast)
            placement = ProofPlacement(
                device,
                chosen,
                stream,
                rounded=None if cast is chosen else cast,
                too_large=obstacle(architecture, chosen, device, stream=stream),
            )
            if placement.too_large is None:
                return placement
    return placement


def obstacle(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, *, stream: bool
) -> str | None:
    """Say why the two models of a proof cannot run one after the other, if they cannot."""
    if dtype is torch.float64 and not has_float64(device.type):
        return f"{device.type} does not compute in float64"
    lacking = _memory_shortage(architecture, device, dtype, stream=stream)
    if lacking and stream:
        return f"two of its blocks at a time need {lacking}"
    if lacking:
        return f"the model needs {lacking}"
    if stream:
        written = converted_bytes(architecture, dtype)
        free = free_space(cache_root())
        lacking = shortage(written, free, "converted weights to the disk")
    if lacking:
        return f"transformers would write {lacking}"
    return None


def _memory_shortage(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, *, stream: bool
) -> str | None:
    needed = PEAK_SHARE * model_bytes(architecture, dtype, stream=stream)
    return memory_shortage(round(needed), device, whole=True)
