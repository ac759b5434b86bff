"""Load the dense model: where its weights are, in which data type, and its blocks to skip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sleb_cli.engine.device import cpu_dtypes, dtype_name, parse_dtype
from sleb_cli.engine.forward.ending import ending_of
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.offload import OffloadedBlocks, offloaded_values
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import StreamedBlocks, require_streamable
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import DeviceMap, Placement, explain_oom, load_complete
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO
from sleb_plugins import UnsupportedModelError


def open_model(architecture: Architecture, placement: Placement, notify: Notify) -> SkippableModel:
    """Load the dense model; its blocks can be skipped once it is entered as a context."""
    source = architecture.source
    blocks_path = architecture.adapter.blocks_path

    # A streamed model: its blocks stay in the files, and are read one at a time.
    if placement.stream:
        with (
            task(notify, f"Loading {source.id} without its blocks"),
            explain_oom(source, placement),
        ):
            streamed = StreamedBlocks(
                architecture, placement.dtype, placement.device, placement.rounded
            )
        return SkippableModel(
            streamed.model,
            streamed.modules,
            device=placement.device,
            weights=streamed,
            ending=ending_of(architecture, placement.device),
        )

    # Any other: transformers puts each weight straight to its place.
    with task(notify, f"Loading {source.id}"), explain_oom(source, placement):
        source.weights.tensor_names()  # its errors name the broken file
        model = load_complete(
            architecture,
            architecture.auto_class,
            source.folder,
            f"the weights of {source.id}",
            placement,
            trust_remote_code=source.trust_remote_code,
        )

    # It computes as the checkpoint to be written will, which may hold a narrower data type.
    if placement.rounded:
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(placement.rounded))

    # accelerate may have put weights on several devices: blocks must be whole.
    for name, mapped in getattr(model, "hf_device_map", {}).items():
        inside = name.removeprefix(f"{blocks_path}.")
        if inside != name and "." in inside:
            raise UnsupportedModelError(
                f"accelerate would split a block across devices: it puts {name} alone on {mapped}.",
                hint="Use --stream, or a device with more memory.",
            )

    blocks = architecture.blocks_of(model)
    ending = ending_of(architecture, placement.device)
    values = offloaded_values(model)
    if values is None:
        return SkippableModel(model, blocks, ending=ending)
    weights = OffloadedBlocks(values, list(blocks))
    return SkippableModel(model, blocks, weights=weights, ending=ending)


def place_model(
    architecture: Architecture,
    device: torch.device,
    dtype: str,
    notify: Notify,
    *,
    device_map: DeviceMap | None = None,
    stream: bool | None = None,
    reserved: int = 0,
    cast: torch.dtype | None = None,
) -> Placement:
    """Choose the data type that a model computes in, and whether its blocks are streamed.

    `dtype` is a name, or auto; `cast` is the data type of the checkpoint to be written, if not the
    model's own. A `device_map` places modules that are not all on the device. With `stream=None`, a
    model is streamed that does not fit into memory besides the `reserved` bytes.
    """
    if device_map is not None:  # which says where weights are, so that they cannot be rounded first
        name = dtype_name(cast) if cast else dtype
        chosen = choose_dtype(architecture, name, device, lambda wide: None, notify)
        return Placement(device, chosen, device_map=device_map)
    if stream:
        require_streamable(architecture)
    shortage = partial(_shortage, architecture, device, reserved)
    streams = bool(stream)
    if stream is None:
        streams = shortage(cast or architecture.dtype or torch.float32) is not None
    lack = partial(shortage, stream=streams)
    chosen = choose_dtype(architecture, dtype, device, lack, notify, cast)
    lacking = None
    if stream is None and not architecture.is_quantized:
        lacking = shortage(chosen)
    if lacking:
        needs = f"In {dtype_name(chosen)}, {architecture.source.id} needs {lacking} on {device}."
        notify(Notice(f"{needs} Streaming its blocks from disk (--stream)."))
    rounded = None if cast is chosen else cast
    return Placement(device, chosen, stream=bool(stream or lacking), rounded=rounded)


def _shortage(
    architecture: Architecture,
    device: torch.device,
    reserved: int,
    dtype: torch.dtype,
    *,
    stream: bool = False,
) -> str | None:
    """Return a clause on the memory that the model lacks in this data type, or None."""
    return memory_shortage(model_bytes(architecture, dtype, stream=stream) + reserved, device)


def choose_dtype(
    architecture: Architecture,
    name: str,
    device: torch.device,
    lack: Callable[[torch.dtype], str | None],
    notify: Notify,
    cast: torch.dtype | None = None,
) -> torch.dtype:
    """Choose the data type to compute in: for auto, the weights' own (or `cast`), or float32 where
    a CPU emulates it.

    `lack` says how much memory a data type lacks; if float32 lacks any, the weights' own is chosen.
    """
    dtype = parse_dtype(name, cast or architecture.dtype)
    if name != AUTO or device.type != "cpu" or dtype in cpu_dtypes() or architecture.is_quantized:
        return dtype
    lacking = lack(torch.float32)
    if lacking is None:
        return torch.float32
    notify(
        Notice(
            f"This will be slow: the processor has no {dtype_name(dtype)} arithmetic, and float32 "
            f"needs {lacking}."
        )
    )
    return dtype


def blocks_on_disk(architecture: Architecture, count: int, device: torch.device) -> DeviceMap:
    """Return a device map that leaves `count` blocks on disk, and puts the rest on a device."""
    main: int | str = device.index or 0
    if device.type in ("cpu", "mps"):
        main = device.type
    path = architecture.adapter.blocks_path
    places: dict[str, int | str] = {f"{path}.{block}": "disk" for block in range(count)}
    for name, module in architecture.skeleton.named_modules():
        if name.startswith(f"{path}."):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensors and not any(module.children()):
            places[name] = main
            continue
        # A module around others, such as the model itself, may have weights of its own.
        for tensor, _ in tensors:
            places[f"{name}.{tensor}" if name else tensor] = main
    return places
