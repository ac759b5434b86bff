"""A model larger than memory: its blocks stay in the weight files, and are read one at a time as they are visited.

Everything outside the blocks (embeddings, final norm, head) is in memory. While one block computes, a thread reads the
next one into a second buffer, so there are never more than two blocks in memory. What the files hold becomes parameters
by transformers' own loader, which knows how families rename, stack and cast them.

Weights come to lie at the same addresses, modulo a page, as where transformers maps the files into memory, because fast
kernels may round differently at others: so the numbers are those of the model in memory. If the files do not fit into
the system's page cache, they are read past it, which leaves the CPU to the blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from sleb_cli.engine.device import CPU, dtype_name, free_bytes, synchronize
from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.weights import TORCH_DTYPES, StoredTensor, load_pickle
from sleb_cli.engine.forward.block_weights import ALIGNED, BlockWeights
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import fits, loading_problem
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notice, Notify, task
from sleb_cli.units import format_bytes
from sleb_plugins import ModelError, UnsupportedModelError
from sleb_plugins.config_keys import kept_blocks

PAGE = 4096
"""Files are mapped at multiples of this many bytes, and read past the page cache in such pieces."""

WITH_STREAMS = ("cuda", "xpu")
"""Devices to which a thread copies from pinned memory while others compute."""


def choose_to_stream(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    asked: bool | None,
    notify: Notify,
    *,
    beside: int = 0,
) -> bool:
    """Return whether to stream a model: as the user asked, or else if it does not fit into free memory.

    `beside` is what must fit with its weights, in bytes.

    Raises:
        UnsupportedModelError: the user asked, but the weights are quantized.
    """
    if asked:
        require_streamable(architecture)
    if architecture.is_quantized:
        return False
    needed, free = weight_bytes(architecture, dtype) + beside, free_bytes(device)
    if asked is None and needed > free:
        notify(
            Notice(
                f"{architecture.source.id} needs {format_bytes(needed)} of memory in {dtype_name(dtype)}, but only "
                f"{format_bytes(free)} are free on {device}. Streaming its blocks from disk (--stream)."
            )
        )
        return True
    return bool(asked)


def require_streamable(architecture: Architecture) -> None:
    """Check that the weights can be read block by block.

    Raises:
        UnsupportedModelError: they are quantized.
    """
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its weights cannot be streamed block by block.",
            hint="Stream the original model instead, or leave out --stream.",
        )


def weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return how much memory the weights take in this data type; packed ones take what they take in the files."""
    return sum(_bytes_as(dtype, tensor) for tensor in architecture.source.weights.stored)


def streamed_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return how much memory the weights take if they are streamed: two blocks, and what is outside of them."""
    by_block, outside = _divide(architecture)
    taken_as_is = not converted_bytes(architecture, dtype) and all(
        TORCH_DTYPES.get(tensor.dtype) is dtype for block in by_block for tensor in block
    )
    buffer = max(map(_layout_bytes, by_block))
    made = 0 if taken_as_is else max(sum(_bytes_as(dtype, tensor) for tensor in block) for block in by_block)
    return sum(_bytes_as(dtype, tensor) for tensor in outside) + 2 * (buffer + made)


def converted_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return how much transformers writes to disk if the blocks stay there, because it stores weights otherwise."""
    plans = get_model_conversion_mapping(architecture.skeleton)
    return weight_bytes(architecture, dtype) if any(isinstance(plan, WeightConverter) for plan in plans) else 0


def _bytes_as(dtype: torch.dtype, tensor: StoredTensor) -> int:
    own = TORCH_DTYPES.get(tensor.dtype)
    plain = own is not None and own.is_floating_point and own.itemsize > 1
    return math.prod(tensor.shape) * dtype.itemsize if plain else tensor.size


def stream_dense(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, notify: Notify
) -> SkippableModel:
    """Load all but the blocks of the dense model, and return it, ready to be entered as a context.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
        OutOfMemory: what is outside the blocks does not fit into the device's memory.
    """
    source = architecture.source
    with task(notify, f"Loading {source.id} without its blocks"), fits(source, dtype, device):
        blocks = StreamedBlocks(architecture, dtype, device)
    skippable = SkippableModel(blocks.model, blocks.modules, device=device, weights=blocks)
    with skippable, torch.inference_mode():
        skippable.learn_outputs()
    return skippable


class StreamedBlocks(BlockWeights):
    """The blocks of a model in its files. Its parameters are on the meta device, except of the block that is visited.

    Attributes:
        model: the model.
        modules: its blocks.
    """

    resident = False

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._architecture, self._device = architecture, device
        self.model: Any = architecture.build(architecture.config, dtype)
        self.modules = architecture.blocks_of(self.model)
        self._by_block, outside = _divide(architecture)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),  # type: ignore[operator]
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._load_outside(outside)
        self._new: Mapping[str, Tensor] = {}
        self._empty = [_without_values(block) for block in self.modules]
        self._drop(*range(len(self.modules)))
        largest = max(map(_layout_bytes, self._by_block))
        direct = weight_bytes(architecture, dtype) > free_bytes(CPU)
        self._buffers = [_Buffer(largest, device, direct=direct) for _ in range(2)]

    def visit(self, blocks: Iterable[int]) -> Generator[int]:
        """Yield these blocks one by one, each with its weights in place until the next is asked for.

        Raises:
            ModelError: the weights of a block do not fit the config, or cannot be read.
        """
        order = list(blocks)
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._load, block, n) for n, block in enumerate(order[:1])]
            for n, block in enumerate(order):
                coming.pop().result()
                if n + 1 < len(order):
                    coming.append(reader.submit(self._load, order[n + 1], n + 1))
                self._renew(block)
                try:
                    yield block
                except GeneratorExit:
                    for loading in coming:
                        loading.exception()
                    self._drop(*order[n : n + 2])
                    raise
                self._drop(block)

    def align(self) -> None:
        """Have weights lie at multiples of 64 bytes from now on, and not as in their mapped file."""
        for buffer in self._buffers:
            buffer.as_mapped = False

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let blocks that are visited while the context is open have these values, by the model's names."""
        before = self._new
        self._new = {**before, **values}
        try:
            yield
        finally:
            self._new = before

    def _renew(self, block: int) -> None:
        prefix = f"{self._architecture.adapter.blocks_path}.{block}."
        for name, value in self._new.items():
            if name.startswith(prefix):
                parameter = self.model.get_parameter(name)
                parameter.data = value.to(parameter.device, parameter.dtype)

    def _load(self, block: int, number: int) -> None:
        """Read a block and put its weights in place; runs in the thread."""
        stored = self._by_block[block]
        tensors = self._buffers[number % 2].read(stored)
        self._place(tensors)
        self.modules[block].requires_grad_(False)
        empty = [name for name, tensor in self.modules[block].state_dict().items() if tensor.is_meta]
        if empty:
            raise self._misfit(f"block {block} has no {empty[0]}")

    def _drop(self, *blocks: int) -> None:
        """Take the weights of these blocks away, once the device is done with them."""
        synchronize(self._device)
        for block in blocks:
            for module, name, tensor in self._empty[block]:
                setattr(module, name, tensor)

    def _place(self, tensors: Mapping[str, Tensor]) -> Any:
        """Let transformers make parameters of these tensors of the files; return its loading info."""
        with translate_transformers_errors(f"the weights of {self._architecture.source.id}"):
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self._config)
        problem = loading_problem(info.to_dict(), "mismatched")
        if problem or info.conversion_errors:
            raise self._misfit(problem or str(next(iter(info.conversion_errors.values()))))
        return info

    def _load_outside(self, stored: Sequence[StoredTensor]) -> None:
        """Put everything outside the blocks in place, and give the blocks the buffers that no file holds."""
        info = self._place(_Buffer(_layout_bytes(stored), self._device).read(stored))
        inside = {f"{self._architecture.adapter.blocks_path}.{name}" for name in self.modules.state_dict()}
        info.missing_keys -= inside
        with translate_transformers_errors(f"the weights of {self._architecture.source.id}"):
            info = self.model._finalize_model_loading(self.model, self._config, info)
        if problem := loading_problem(info.to_dict(), "missing"):
            raise self._misfit(problem)
        folder = self._architecture.source.folder
        if (folder / "generation_config.json").is_file():
            with translate_transformers_errors(f"{folder / 'generation_config.json'}"):
                self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.model.requires_grad_(False).eval()

    def _misfit(self, problem: str) -> ModelError:
        return ModelError(
            f"The weights of {self._architecture.source.id} do not fit its config: {problem}.",
            hint="Copy or download the model again.",
        )


def _divide(architecture: Architecture) -> tuple[list[list[StoredTensor]], list[StoredTensor]]:
    """Return the stored tensors of each block, and those outside the blocks."""
    count = architecture.block_count
    names = architecture.block_names(kept_blocks(count, ()))
    by_block: list[list[StoredTensor]] = [[] for _ in range(count)]
    outside = []
    for tensor in architecture.source.weights.stored:
        block = names.block_of(tensor.name)
        if block is None:
            outside.append(tensor)
        elif block < count:  # those after the last block predict further tokens, and no model loads them
            by_block[block].append(tensor)
    return by_block, outside


def _without_values(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return what comes from files, by module and name, on the meta device; some families make it elsewhere."""
    found: list[tuple[nn.Module, str, Tensor]] = []
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.append((module, name, nn.Parameter(parameter.to("meta"), requires_grad=False)))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((module, name, buffer.to("meta")))
    return found


def _layout_bytes(stored: Sequence[StoredTensor]) -> int:
    """Return the size of a buffer for these tensors, with room to align each."""
    ordered = sorted(stored, key=lambda tensor: (str(tensor.path), tensor.start or 0))
    gaps = sum(a.path != b.path or (a.start or 0) + a.size != b.start for a, b in pairwise(ordered))
    return sum(tensor.size + ALIGNED for tensor in stored) + 3 * PAGE * (1 + gaps)


class _Buffer:
    """Memory on a device that tensors are read into, over and over; `direct` reads past the page cache."""

    def __init__(self, size: int, device: torch.device, *, direct: bool = False) -> None:
        self._copies = device.type in WITH_STREAMS
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self._copies)
        self._there = self._host if device == CPU else torch.empty(size, dtype=torch.uint8, device=device)
        self._device, self._direct = device, direct
        self.as_mapped = device == CPU

    def read(self, stored: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """Read tensors of weight files; those of safetensors lie in this buffer, until it is read into again."""
        found: dict[str, Tensor] = {}
        places: dict[str, tuple[int, StoredTensor]] = {}
        end = 0
        for path in dict.fromkeys(tensor.path for tensor in stored):
            here = [tensor for tensor in stored if tensor.path == path]
            if path.suffix != ".safetensors":
                held = load_pickle(path)
                found |= {tensor.name: held[tensor.name] for tensor in here}
                continue
            with reading(path), _opened(path, direct=self._direct and self.as_mapped) as file:
                read_to = None
                for tensor in sorted(here, key=lambda tensor: tensor.start or 0):
                    begin = self._after(end, tensor, follows=tensor.start == read_to)
                    self._read_into(file, begin, tensor)
                    places[tensor.name], end = (begin, tensor), begin + tensor.size
                    read_to = (tensor.start or 0) + tensor.size
        self._hand_over(end)
        return found | {name: self._view(begin, tensor) for name, (begin, tensor) in places.items()}

    def _after(self, end: int, tensor: StoredTensor, *, follows: bool) -> int:
        """Return where a tensor begins: modulo a page, as in a mapped file, or else aligned.

        The page in which it begins may be read whole, so it is not the last of another tensor, unless it `follows` that
        in the file, too.
        """
        place = end + self._there.data_ptr()
        if not self.as_mapped:
            return end + -place % ALIGNED
        if follows:
            return end
        start = tensor.start or 0
        begin = end + (start - place) % PAGE
        return begin if begin - start % PAGE >= end else begin + PAGE

    def _read_into(self, file: int, begin: int, tensor: StoredTensor) -> None:
        """Read a stored tensor to the place where it begins; in whole pages, if it lies there as in a mapped file."""
        start = tensor.start or 0
        lead = start % PAGE if self.as_mapped else 0
        wanted, done = lead + tensor.size, 0
        whole = -(-wanted // PAGE) * PAGE if self.as_mapped else wanted
        view = memoryview(self._host[begin - lead :][:whole].numpy().data)
        while done < wanted:
            count = os.preadv(file, [view[done:]], start - lead + done)
            if not count:
                raise ModelError(f"{tensor.path} became shorter while sleb read it.", hint="Copy or download it again.")
            done += count

    def _hand_over(self, size: int) -> None:
        """Copy what was read to the device, while it computes if it can do both."""
        if self._copies:
            module = torch.get_device_module(self._device.type)
            stream = module.Stream(self._device)
            with module.stream(stream):
                self._there[:size].copy_(self._host[:size], non_blocking=True)
            stream.synchronize()
        elif self._there is not self._host:
            self._there[:size].copy_(self._host[:size])

    def _view(self, begin: int, tensor: StoredTensor) -> Tensor:
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.name} is stored as {tensor.dtype}, which torch does not support.",
                hint="Convert the weights to a data type of torch.",
            )
        part = self._there[begin : begin + tensor.size]
        if begin % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).view(tensor.shape)


@contextmanager
def _opened(path: Path, *, direct: bool) -> Iterator[int]:
    """Open a file, past the page cache if asked and if its file system can; it is then read in whole pages."""
    file = None
    if direct and hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    file = os.open(path, os.O_RDONLY) if file is None else file
    try:
        yield file
    finally:
        os.close(file)
