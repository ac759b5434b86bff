"""A model larger than memory: its blocks are read from the weight files as they are visited.

Everything outside the blocks (embeddings, final norm, head) is in memory. While one block computes,
a thread reads the next one, so there are never more than two blocks in memory. transformers' own
loader makes parameters of the tensors in the files, since it knows how families rename, stack and
cast them.

Weights come to lie at the same addresses, modulo a page, as where transformers maps the files into
memory, because fast kernels may round differently at others: so a streamed model gives the same
numbers as one in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU, synchronize
from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.headers import StoredTensor
from sleb_cli.engine.files.pickles import TORCH_DTYPES, load_pickle
from sleb_cli.engine.forward.block_weights import BlockWeights, Visit
from sleb_cli.engine.forward.memory_needs import tensors_by_block
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import loading_problem, misfit, read_generation_config
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.engine.transformers_internals import (
    LoadStateDictConfig,
    convert_and_load_state_dict_in_model,
    get_model_conversion_mapping,
)
from sleb_plugins import ModelError, UnsupportedModelError

PAGE = 4096
"""Files are mapped at multiples of this many bytes."""

WITH_STREAMS = ("cuda", "xpu")
"""Devices to which a thread copies from pinned memory while others compute."""


def require_streamable(architecture: Architecture) -> None:
    """Refuse quantized weights, which cannot be read block by block."""
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its weights cannot be streamed block by "
            "block.",
            hint="Stream the original model instead, or leave out --stream.",
        )


class StreamedBlocks(BlockWeights):
    """The blocks of a model in its files; only the visited block has parameters in memory."""

    resident = False

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        rounded: torch.dtype | None = None,
    ) -> None:
        self._architecture = architecture
        self._device = device
        self._rounded = rounded
        self._stream = None
        if device.type in WITH_STREAMS:
            self._stream = torch.get_device_module(device).Stream(device)
        self._as_mapped = device == CPU
        self._new: Mapping[str, Tensor] = {}
        """Values that take the place of those in the files."""
        self.model: Any = architecture.build(architecture.config, dtype)
        self.modules = architecture.blocks_of(self.model)
        # While a block is away, its parameters are these, on the meta device.
        self._empty = [block.state_dict(keep_vars=True) for block in self.modules]
        self._by_block, outside = tensors_by_block(architecture)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),  # type: ignore[operator]
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._load_outside(outside)
        self.drop(range(len(self.modules)))

    def visit(self, blocks: Sequence[int]) -> Visit:
        """Return a visit to these blocks, which reads the weights of each."""
        return _StreamedVisit(self, blocks)

    def align(self) -> None:
        """Align weights that are read from now on, rather than leave them as in a mapped file."""
        self._as_mapped = False

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give blocks that are visited in this context these values, by the model's names."""
        before = self._new
        self._new = {**before, **values}
        try:
            yield
        finally:
            self._new = before

    def renew(self, block: int) -> None:
        """Give a block that was read the values that take the place of those in the files."""
        prefix = f"{self._architecture.adapter.blocks_path}.{block}."
        for name, value in self._new.items():
            if name.startswith(prefix):
                parameter = self.model.get_parameter(name)
                parameter.data = value.to(parameter.device, parameter.dtype)

    def read(self, block: int) -> None:
        """Read the weights of a block into the model."""
        self._put_in_place(self._read_tensors(self._by_block[block]))
        self.modules[block].requires_grad_(False)
        for name, tensor in self.modules[block].state_dict().items():
            if tensor.is_meta:
                raise misfit(self._architecture, f"block {block} has no {name}")

    def drop(self, blocks: Sequence[int]) -> None:
        """Free the weights of blocks."""
        synchronize(self._device)  # it may still compute with these weights
        for block in blocks:
            for name, tensor in self._empty[block].items():
                path, _, leaf = name.rpartition(".")
                setattr(self.modules[block].get_submodule(path), leaf, tensor)

    def _read_tensors(self, stored: Sequence[StoredTensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in dict.fromkeys(tensor.path for tensor in stored):
            in_file = [tensor for tensor in stored if tensor.path == path]
            if path.suffix == ".safetensors":
                with reading(path), path.open("rb") as file:
                    for tensor in in_file:
                        tensors[tensor.name] = self._read_tensor(file, tensor)
            else:
                pickled = load_pickle(path)
                for tensor in in_file:
                    tensors[tensor.name] = pickled[tensor.name]
        if self._rounded:
            for name, value in tensors.items():
                if value.is_floating_point():
                    tensors[name] = value.to(self._rounded)
        return self._to_device(tensors)

    def _to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in tensors.items()}
        # A stream of its own copies while the device computes the block before.
        copies = {}
        with torch.get_device_module(self._device).stream(self._stream):
            for name, tensor in tensors.items():
                copies[name] = tensor.to(self._device, non_blocking=True)
        self._stream.synchronize()
        return copies

    def _read_tensor(self, file: BufferedReader, tensor: StoredTensor) -> Tensor:
        """Read a tensor to the address that a mapped file would have, modulo a page, or else to an
        aligned one.
        """
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.name} is stored as {tensor.dtype}, which torch does not support.",
                hint="Convert the weights to a data type that torch supports.",
            )
        start = tensor.start or 0
        room = PAGE if self._as_mapped else 0
        pinned = self._stream is not None
        memory = torch.empty(tensor.size + room, dtype=torch.uint8, pin_memory=pinned)
        begin = 0
        if self._as_mapped:
            begin = (start - memory.data_ptr()) % PAGE
        values = memory[begin : begin + tensor.size]
        file.seek(start)
        if file.readinto(values.numpy().data) < tensor.size:
            raise ModelError(
                f"{tensor.path} became shorter while sleb read it.",
                hint="Copy or download it again.",
            )
        if begin % dtype.itemsize:  # torch views bytes as numbers only at multiples of their size
            values = values.clone()
        return values.view(dtype).view(tensor.shape)

    def _put_in_place(self, tensors: Mapping[str, Tensor]) -> Any:
        """Let transformers make parameters of these tensors; return its loading info."""
        with translate_transformers_errors(f"the weights of {self._architecture.source.id}"):
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self._config)
        problem = loading_problem(self._architecture, info.to_dict(), "mismatched")
        if problem is None and info.conversion_errors:
            problem = str(next(iter(info.conversion_errors.values())))
        if problem:
            raise misfit(self._architecture, problem)
        return info

    def _load_outside(self, stored: Sequence[StoredTensor]) -> None:
        """Load all that is outside the blocks, and the blocks' buffers that no file holds."""
        info = self._put_in_place(self._read_tensors(stored))
        path = self._architecture.adapter.blocks_path
        info.missing_keys -= {f"{path}.{name}" for name in self.modules.state_dict()}
        with translate_transformers_errors(f"the weights of {self._architecture.source.id}"):
            info = self.model._finalize_model_loading(self.model, self._config, info)
        problem = loading_problem(self._architecture, info.to_dict(), "missing")
        if problem:
            raise misfit(self._architecture, problem)
        read_generation_config(self.model, self._architecture.source.folder)
        self.model.requires_grad_(False).eval()


class _StreamedVisit(Visit):
    """Reads the weights of each block, and of the next one while it computes."""

    def __init__(self, streamed: StreamedBlocks, blocks: Sequence[int]) -> None:
        self._streamed = streamed
        self._order = list(blocks)
        self._next = 0
        self._reader = ThreadPoolExecutor(1)
        self._coming = self._begin_to_read()

    def load(self, block: int) -> None:
        if self._coming is None or self._order[self._next] != block:
            raise UnsupportedModelError(
                f"{self._streamed.model.config.model_type} does not call its blocks once each, in "
                "order.",
                hint="sleb cannot stream it. Use a machine with more memory.",
            )
        if self._next > 0:
            self._streamed.drop([self._order[self._next - 1]])
        self._coming.result()
        self._next += 1
        self._coming = self._begin_to_read()
        self._streamed.renew(block)

    def close(self) -> None:
        self._reader.shutdown()
        self._streamed.drop(self._order)

    def _begin_to_read(self) -> Future[None] | None:
        if self._next == len(self._order):
            return None
        return self._reader.submit(self._streamed.read, self._order[self._next])
