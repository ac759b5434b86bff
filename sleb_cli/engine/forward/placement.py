"""Where the weights of the dense model are while it is searched, measured or recovered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sleb_cli.engine.device import choose_device, cpu_dtypes, dtype_name, own_free_bytes, parse_dtype
from sleb_cli.engine.forward.block_weights import BlockWeights
from sleb_cli.engine.forward.offload import Offloaded, offloaded_values
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import StreamedBlocks, require_streamable, streamed_bytes, weight_bytes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.fewer_bits import report_unpacked
from sleb_cli.engine.surgery.loading import DeviceMap, fits, load_dense
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO, ApplyRequest, EvalRequest, SearchRequest
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError, UnsupportedModelError, UsageError
from sleb_plugins.errors import did_you_mean

CHOSEN_BY_ACCELERATE = ("auto", "balanced", "sequential")
"""How accelerate may choose the places."""

_EXAMPLE = 'Write {"": 0, "model.layers.7": 1, "model.layers.8": "cpu", "model.layers.9": "disk"}.'


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are, and in which data type it computes.

    Attributes:
        device: where tokens go in and logits come out, and, unless a device map says otherwise, all weights are.
        dtype: the data type.
        rounded: the narrower data type that weights are rounded to first, as in the checkpoint to be written; None for
            none.
        stream: whether the blocks stay in the files, and are read one at a time.
        device_map: the places of modules, as `accelerate` takes them; None for `device` alone.
        load_in: how many bits a weight takes, if fewer than in `dtype`: 8 or 4.
    """

    device: torch.device
    dtype: torch.dtype
    stream: bool = False
    device_map: DeviceMap | None = None
    load_in: int | None = None
    rounded: torch.dtype | None = None


def place_model(
    architecture: Architecture,
    device: torch.device,
    dtype: str,
    notify: Notify,
    *,
    device_map: DeviceMap | None = None,
    stream: bool | None = None,
    beside: int = 0,
    cast: torch.dtype | None = None,
) -> Placement:
    """Choose the data type that a model computes in, and whether its blocks are streamed.

    Args:
        architecture: the model.
        device: where it runs.
        dtype: the data type by name, or auto.
        notify: the listener for events.
        device_map: the places of its modules, if they are not all on the device.
        stream: whether the user wants its blocks to be streamed; None streams a model that does not fit into memory.
        beside: the bytes that must fit besides its weights.
        cast: the data type of the checkpoint to be written; None for the model's own.

    Raises:
        UsageError: there is no such data type.
        UnsupportedModelError: the weights are quantized, so they cannot be streamed.
    """
    own = cast or architecture.dtype or torch.float32
    if device_map is not None:  # which says where weights are, so that they cannot be rounded first
        name = dtype_name(cast) if cast else dtype
        return Placement(
            device, choose_dtype(architecture, name, device, lambda wide: 0, own_free_bytes, notify), False, device_map
        )

    def needed(wide: torch.dtype) -> int:
        does_not_fit = stream is None and weight_bytes(architecture, own) + beside > own_free_bytes(device)
        return (streamed_bytes if stream or does_not_fit else weight_bytes)(architecture, wide) + beside

    chosen = choose_dtype(architecture, dtype, device, needed, own_free_bytes, notify, cast)
    if stream:
        require_streamable(architecture)
    streams = bool(stream)
    if stream is None and not architecture.is_quantized:
        size, free = weight_bytes(architecture, chosen) + beside, own_free_bytes(device)
        if streams := size > free:
            notify(
                Notice(
                    f"{architecture.source.id} needs {format_bytes(size)} of memory in {dtype_name(chosen)}, but only "
                    f"{format_bytes(free)} is free on {device}. Streaming its blocks from disk (--stream)."
                )
            )
    return Placement(device, chosen, streams, rounded=None if cast is chosen else cast)


def choose_dtype(
    architecture: Architecture,
    name: str,
    device: torch.device,
    needed: Callable[[torch.dtype], int],
    free_of: Callable[[torch.device], int],
    notify: Notify,
    cast: torch.dtype | None = None,
) -> torch.dtype:
    """Choose the data type to compute in: for auto, the weights' own (or `cast`), or float32 where a CPU emulates it.

    `needed` returns the bytes of memory that a data type takes; if float32 does not fit into what is free, it stays the
    own one.

    Raises:
        UsageError: there is no such data type.
    """
    dtype = parse_dtype(name, cast or architecture.dtype)
    if name != AUTO or device.type != "cpu" or dtype in cpu_dtypes() or architecture.is_quantized:
        return dtype
    size, free = needed(torch.float32), free_of(device)
    if size <= free:
        return torch.float32
    notify(
        Notice(
            f"This will be slow: the processor has no {dtype_name(dtype)} arithmetic, and float32 needs "
            f"{format_bytes(size)} of memory, but only {format_bytes(free)} is free."
        )
    )
    return dtype


def open_dense(architecture: Architecture, placement: Placement, notify: Notify) -> SkippableModel:
    """Return the dense model, ready to be entered as a context.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
        OutOfMemory: they do not fit into memory.
        UnsupportedModelError: accelerate spreads a block over several devices.
    """
    if placement.stream:
        dtype, device = placement.dtype, placement.device
        loading = f"Loading {architecture.source.id} without its blocks"
        with task(notify, loading), fits(architecture.source, dtype, device):
            streamed = StreamedBlocks(architecture, dtype, device, placement.rounded)
        return SkippableModel(streamed.model, streamed.modules, device=device, weights=streamed)
    model = load_dense(
        architecture,
        placement.dtype,
        placement.device,
        notify,
        device_map=placement.device_map,
        load_in=placement.load_in,
    )
    for tensor in model.state_dict().values() if placement.rounded else ():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(placement.rounded))
    blocks = architecture.blocks_of(model)
    if placement.load_in:
        report_unpacked(blocks, notify)
    return SkippableModel(model, blocks, weights=_weights(model, architecture))


def _weights(model: Any, architecture: Architecture) -> BlockWeights | None:
    path = architecture.adapter.blocks_path
    for name, place in getattr(model, "hf_device_map", {}).items():
        if name.startswith(f"{path}.") and name.removeprefix(f"{path}.").count("."):
            raise UnsupportedModelError(
                f"accelerate would split a block across devices: it puts {name} alone on {place}.",
                hint=f"Choose the devices in a JSON file. {_EXAMPLE}",
            )
    values = offloaded_values(model)
    return None if values is None else Offloaded(values, list(architecture.blocks_of(model)))


def resolve_device_map(
    request: SearchRequest | ApplyRequest | EvalRequest, architecture: Architecture
) -> DeviceMap | None:
    """Return the places of the model's modules that a request asks for, if any: blocks, and all outside them.

    Raises:
        UsageError: the file is no device map of this model, or the option does not go with others.
        MachineError: this machine does not have a device.
    """
    asked = request.device_map
    if asked is None:
        return None
    _require_alone(request)
    if asked in CHOSEN_BY_ACCELERATE:
        return asked
    places = _read(Path(asked))
    known = {name for name, _ in architecture.skeleton.named_modules()}
    for name, place in places.items():
        _require_module(asked, name, known, architecture.adapter.blocks_path)
        _require_device(asked, name, place)
    found = {name: _place(asked, name, places) for name in _placed(architecture)}
    main = min((place for place in found.values() if isinstance(place, int)), default="cpu")
    for name in found.keys() - known:  # a lone weight, which accelerate cannot move when its module runs
        found[name] = main if isinstance(found[name], str) else found[name]
    _require_tied_together(asked, found, architecture)
    return found


def device_of(device_map: DeviceMap | None, device: str | None) -> torch.device:
    """Return the device that decides the data type: the accelerator of a device map, if it has one, or the named one.

    Raises:
        UsageError: there is no such kind of device.
        MachineError: this machine does not have it.
    """
    if device_map is None or isinstance(device_map, str):
        return choose_device(device or AUTO)
    numbers = [place for place in device_map.values() if isinstance(place, int)]
    return torch.device(choose_device(AUTO).type, min(numbers)) if numbers else torch.device("cpu")


def blocks_on_disk(architecture: Architecture, device: torch.device) -> DeviceMap:
    """Return a device map that leaves the blocks in their files, and puts everything else on a device."""
    main = device.type if device.type in ("cpu", "mps") else device.index or 0
    path = f"{architecture.adapter.blocks_path}."
    return {name: "disk" if name.startswith(path) else main for name in _placed(architecture)}


def _require_alone(request: SearchRequest | ApplyRequest | EvalRequest) -> None:
    refused = [
        (
            request.stream,
            "--device-map and --stream cannot be combined: each runs a model that does not fit.",
            "Use one of them: --stream reads each block once a step, a device map once a pass.",
        ),
        (
            request.device not in (None, AUTO),
            "--device-map names the devices, so --device does not apply.",
            "Leave out one of them.",
        ),
        (
            isinstance(request, ApplyRequest) and request.heal,
            "--heal trains, so it needs all weights on its device, but --device-map spreads them out.",
            "Leave out --device-map and heal on a device with enough memory, or recover without training: --recover.",
        ),
        (
            isinstance(request, SearchRequest) and request.target_speedup is not None,
            "--target-speedup times the whole model on one device, but --device-map spreads it out.",
            "Use another target, such as --ratio.",
        ),
    ]
    for given, message, hint in refused:
        if given:
            raise UsageError(message, hint=hint)


def _read(path: Path) -> dict[str, Any]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"Cannot read the device map {path}: {error.strerror}.",
            hint=f"Use {', '.join(CHOSEN_BY_ACCELERATE)}, or a JSON file. {_EXAMPLE}",
        ) from error
    except ValueError as error:
        raise UsageError(f"The device map {path} is not valid JSON: {error}.", hint=_EXAMPLE) from error
    if not isinstance(places, dict) or not places:
        raise UsageError(f"The device map {path} must be an object that maps modules to devices.", hint=_EXAMPLE)
    return places


def _require_module(path: str, name: str, known: set[str], blocks_path: str) -> None:
    if name not in known:
        raise UsageError(
            f"{path} names {name!r}, but the model has no such module.", hint=did_you_mean(name, sorted(known))
        )
    if name.startswith(f"{blocks_path}.") and "." in name.removeprefix(f"{blocks_path}."):
        raise UsageError(
            f"{path} names {name}, which is part of a block, but a block cannot be split.",
            hint="Name the block: " + ".".join(name.split(".")[: blocks_path.count(".") + 2]) + ".",
        )


def _require_device(path: str, name: str, place: object) -> None:
    if place in ("cpu", "disk"):
        return
    if not isinstance(place, int) or isinstance(place, bool) or place < 0:
        raise UsageError(
            f"{path} puts {name!r} on {place!r}, which is not a device.",
            hint='Use "cpu", "disk", or the number of an accelerator, from 0.',
        )
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if place >= count:
        raise MachineError(
            f"{path} puts {name!r} on accelerator {place}, but this machine has {count or 'none'}.",
            hint='Number accelerators from 0, or use "cpu" and "disk".',
        )


def _placed(architecture: Architecture) -> Iterator[str]:
    """Yield what gets a place of its own: each block, and each module outside them that holds weights."""
    path = architecture.adapter.blocks_path
    yield from (f"{path}.{block}" for block in range(architecture.block_count))
    for name, module in architecture.skeleton.named_modules():
        if name.startswith(f"{path}."):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensors and not any(module.children()):
            yield name
        else:  # its own weights, whose places may differ from those of its children
            yield from (f"{name}.{tensor}" if name else tensor for tensor, _ in tensors)


def _place(path: str, name: str, places: Mapping[str, int | str]) -> int | str:
    """Return the place of a module: its own, or that of the nearest one around it."""
    around = name
    while around and around not in places:
        around = around.rpartition(".")[0]
    if around not in places:
        raise UsageError(f"{path} names no device for {name}.", hint='Name one for everything else: {"": 0, ...}.')
    return places[around]


def _require_tied_together(path: str, found: Mapping[str, int | str], architecture: Architecture) -> None:
    tied: Mapping[str, str] = getattr(architecture.skeleton, "all_tied_weights_keys", {})
    for one, other in tied.items():
        left, right = one.rpartition(".")[0], other.rpartition(".")[0]
        if found.get(left) != found.get(right):
            raise UsageError(
                f"{path} puts {left} on {found.get(left)} and {right} on {found.get(right)}, but they share a weight.",
                hint="Put both on the same device.",
            )
