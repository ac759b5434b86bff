"""The size of each block: parameters, bytes of weights, bytes of KV cache. No weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.generation import cache_of
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins import UnsupportedModelError
from sleb_plugins.config_keys import sliced_axis


@dataclass(frozen=True)
class PerBlock:
    """A quantity in each block of a model, and `outside` the blocks."""

    outside: float
    blocks: tuple[float, ...]

    def without(self, removed: Collection[int]) -> float:
        """Return the quantity in the model without these blocks."""
        total = self.outside
        for block, size in enumerate(self.blocks):
            if block not in removed:
                total += size
        return total

    def __add__(self, other: PerBlock) -> PerBlock:
        pairs = zip(self.blocks, other.blocks, strict=True)
        return PerBlock(self.outside + other.outside, tuple(a + b for a, b in pairs))

    def __mul__(self, factor: float) -> PerBlock:
        return PerBlock(self.outside * factor, tuple(size * factor for size in self.blocks))


def count_parameters(architecture: Architecture) -> PerBlock:
    """Count parameters as `bench` does: tied ones once, and quantized ones as if they were not."""
    sizes = []
    for name, parameter in architecture.skeleton.named_parameters():
        sizes.append((name, parameter.numel()))
    return _by_block(architecture, sizes)


def stored_bytes(architecture: Architecture) -> PerBlock:
    """Return the bytes of the tensors in the weight files."""
    stored = architecture.source.weights.stored
    return _by_block(architecture, [(tensor.name, tensor.size) for tensor in stored])


def _by_block(architecture: Architecture, sizes: Iterable[tuple[str, int]]) -> PerBlock:
    count = architecture.block_count
    names = architecture.names
    by_block: dict[int | None, float] = defaultdict(float)
    for name, size in sizes:
        block = names.block_of(name)
        if block is None and sliced_axis(name) is not None:
            for sharing in range(count):
                by_block[sharing] += size / count
        else:
            by_block[block] += size
    # Blocks numbered after the last one, for multi-token prediction, are dropped with any removal.
    return PerBlock(by_block[None], tuple(by_block[block] for block in range(count)))


def cache_bytes(architecture: Architecture, dtype: torch.dtype, length: int) -> PerBlock:
    """Return the bytes of the KV cache that transformers makes for one sequence of `length` tokens.

    The cache is measured after the model, on the meta device, has read such a sequence. This
    accounts for windows, grouped heads, heads of different sizes, blocks that read another block's
    keys, and the states of linear attention and convolutions, which do not grow with the length.
    """
    model = architecture.build(architecture.config).to(torch.bfloat16).eval()
    text = torch.zeros(1, length, dtype=torch.long, device="meta")
    conditions_hold = ConditionsHold()  # type: ignore[no-untyped-call]
    sentence = f"The size of the KV cache of {architecture.config.model_type} is unknown"
    unknown = error_saying(UnsupportedModelError, sentence, "Use another target, such as --ratio.")
    no_run = unknown("it does not run without its weights")
    with torch.no_grad(), conditions_hold, translate_errors(lambda words: no_run):
        output = model(input_ids=text, use_cache=True)
    layers = cache_layers(output)
    if not layers or len(layers) != architecture.block_count:
        raise unknown("it is not kept block by block")

    blocks = []
    for layer in layers:
        size = 0
        for tensor in layer_tensors(layer):
            # Recurrent states are kept in float32, whatever the model computes in.
            kept_in = dtype if tensor.dtype is torch.bfloat16 else tensor.dtype
            size += tensor.numel() * kept_in.itemsize
        blocks.append(float(size))
    return PerBlock(0, tuple(blocks))


def cache_layers(output: Any) -> list[Any]:
    """Return the layers of the cache in a model's output, if it has any."""
    _, cache = cache_of(output)
    return list(getattr(cache, "layers", None) or ())


def layer_tensors(layer: Any) -> list[Tensor]:
    """Return the tensors in one layer of a cache, which may hold them in dictionaries and lists."""
    tensors: dict[int, Tensor] = {}
    for value in vars(layer).values():
        if isinstance(value, dict):
            items = list(value.values())
        elif isinstance(value, list | tuple):
            items = list(value)
        else:
            items = [value]
        for item in items:
            if isinstance(item, Tensor) and item.is_floating_point():
                tensors[id(item)] = item
    return list(tensors.values())


class ConditionsHold(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets every condition hold that a model checks on the meta device: all input is text."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))
