"""Where are the weights of the dense model while it is searched, measured or recovered?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sleb_cli.engine.device import cpu_dtypes, dtype_name, parse_dtype
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.offload import OffloadedBlocks, offloaded_values
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import StreamedBlocks, require_streamable
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import DeviceMap, Placement, explain_oom, load_dense
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO
from sleb_plugins import UnsupportedModelError


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
    default = cast or architecture.dtype or torch.float32
    if device_map is not None:  # which says where weights are, so that they cannot be rounded first
        name = dtype_name(cast) if cast else dtype
        chosen = choose_dtype(architecture, name, device, lambda wide: None, notify)
        return Placement(device, chosen, device_map=device_map)

    def lack(wide: torch.dtype, *, streams: bool = False) -> str | None:
        return memory_shortage(model_bytes(architecture, wide, stream=streams) + reserved, device)

    streams = lack(default) is not None if stream is None else stream
    chosen = choose_dtype(architecture, dtype, device, partial(lack, streams=streams), notify, cast)
    if stream:
        require_streamable(architecture)
    lacking = lack(chosen) if stream is None and not architecture.is_quantized else None
    if lacking:
        needs = f"In {dtype_name(chosen)}, {architecture.source.id} needs {lacking} on {device}."
        notify(Notice(f"{needs} Streaming its blocks from disk (--stream)."))
    return Placement(
        device, chosen, bool(stream or lacking), rounded=None if cast is chosen else cast
    )


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


def open_dense(architecture: Architecture, placement: Placement, notify: Notify) -> SkippableModel:
    """Return the dense model, ready to be entered as a context."""
    if placement.stream:
        loading = f"Loading {architecture.source.id} without its blocks"
        with task(notify, loading), explain_oom(architecture.source, placement):
            streamed = StreamedBlocks(
                architecture, placement.dtype, placement.device, placement.rounded
            )
        return SkippableModel(
            streamed.model, streamed.modules, device=placement.device, weights=streamed
        )
    model = load_dense(architecture, placement, notify)
    for tensor in model.state_dict().values() if placement.rounded else ():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(placement.rounded))
    path = architecture.adapter.blocks_path
    for name, mapped in getattr(model, "hf_device_map", {}).items():
        if name.startswith(f"{path}.") and name.removeprefix(f"{path}.").count("."):
            raise UnsupportedModelError(
                f"accelerate would split a block across devices: it puts {name} alone on {mapped}.",
                hint="Use --stream, or a device with more memory.",
            )
    values, blocks = offloaded_values(model), architecture.blocks_of(model)
    return SkippableModel(
        model, blocks, weights=None if values is None else OffloadedBlocks(values, list(blocks))
    )


def blocks_on_disk(architecture: Architecture, count: int, device: torch.device) -> DeviceMap:
    """Return a device map of a model of `count` blocks that leaves them in their files, and all
    else on a device.
    """
    main = device.type if device.type in ("cpu", "mps") else device.index or 0
    path = architecture.adapter.blocks_path
    places: dict[str, int | str] = {f"{path}.{block}": "disk" for block in range(count)}
    for name, module in architecture.skeleton.named_modules():
        if name.startswith(f"{path}."):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensors and not any(module.children()):
            places[name] = main
        else:  # a module around others, such as the model itself, may have weights of its own
            places |= {f"{name}.{tensor}" if name else tensor: main for tensor, _ in tensors}
    return places
