"""A model larger than memory: its blocks stay in the weight files, and are read one at a time as
they are visited.

Everything outside the blocks (embeddings, final norm, head) is in memory. While one block computes,
a thread reads the next one, so there are never more than two blocks in memory. transformers' own
loader makes parameters of the tensors in the files, since it knows how families rename, stack and
cast them.

Weights come to lie at the same addresses, modulo a page, as where transformers maps the files into
memory, because fast kernels may round differently at others: so a streamed model gives the same
numbers as one in memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.device import CPU, synchronize
from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.headers import StoredTensor
from sleb_cli.engine.files.pickles import TORCH_DTYPES, load_pickle
from sleb_cli.engine.forward.block_weights import BlockWeights
from sleb_cli.engine.forward.memory_needs import tensors_by_block
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import loading_problem
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
            f"block.",
            hint="Stream the original model instead, or leave out --stream.",
        )


class StreamedBlocks(BlockWeights):
    """The blocks of a model in its files; its parameters are on the meta device, but for the block
    that is visited.
    """

    resident = False

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        rounded: torch.dtype | None = None,
    ) -> None:
        self._architecture, self._device, self._rounded = architecture, device, rounded
        self._stream = (
            torch.get_device_module(device).Stream(device) if device.type in WITH_STREAMS else None
        )
        self._as_mapped = device == CPU
        self.model: Any = architecture.build(architecture.config, dtype)
        self.modules = architecture.blocks_of(self.model)
        self._empty = [
            block.state_dict(keep_vars=True) for block in self.modules
        ]  # on the meta device
        self._by_block, outside = tensors_by_block(architecture)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),  # type: ignore[operator]
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._load_outside(outside)
        self._new: Mapping[str, Tensor] = {}
        self._drop(*range(len(self.modules)))

    def visit(self, blocks: Iterable[int]) -> Generator[int]:
        """Yield these blocks one by one, each with its weights in place until the next."""
        order = list(blocks)
        try:
            with ThreadPoolExecutor(1) as reader:
                coming = [reader.submit(self._load, block) for block in order[:1]]
                for number, block in enumerate(order, start=1):
                    coming.pop().result()
                    coming = [
                        reader.submit(self._load, following)
                        for following in order[number : number + 1]
                    ]
                    self._renew(block)
                    yield block
                    self._drop(block)
        finally:
            self._drop(*order)

    def align(self) -> None:
        """Align weights that are read from now on, rather than leave them as in a mapped file."""
        self._as_mapped = False

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let blocks that are visited while the context is open have these values, by the model's
        names.
        """
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

    def _load(self, block: int) -> None:
        self._put_in_place(self._read(self._by_block[block]))
        self.modules[block].requires_grad_(False)
        empty = [
            name for name, tensor in self.modules[block].state_dict().items() if tensor.is_meta
        ]
        if empty:
            raise self._misfit(f"block {block} has no {empty[0]}")

    def _read(self, stored: Sequence[StoredTensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in dict.fromkeys(tensor.path for tensor in stored):
            in_file = [tensor for tensor in stored if tensor.path == path]
            if path.suffix == ".safetensors":
                with reading(path), path.open("rb") as file:
                    tensors |= {tensor.name: self._read_tensor(file, tensor) for tensor in in_file}
            else:
                pickled = load_pickle(path)
                tensors |= {tensor.name: pickled[tensor.name] for tensor in in_file}
        if self._rounded:
            floats = {
                name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()
            }
            tensors |= {name: tensor.to(self._rounded) for name, tensor in floats.items()}
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in tensors.items()}
        # A stream of its own copies while the device computes the block before.
        with torch.get_device_module(self._device).stream(self._stream):
            tensors = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()
            }
        self._stream.synchronize()
        return tensors

    def _read_tensor(self, file: BufferedReader, tensor: StoredTensor) -> Tensor:
        """Read a tensor to the address that a mapped file would have, modulo a page, or else to an
        aligned one.
        """
        dtype, start = TORCH_DTYPES.get(tensor.dtype), tensor.start or 0
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.name} is stored as {tensor.dtype}, which torch does not support.",
                hint="Convert the weights to a data type that torch supports.",
            )
        room = PAGE if self._as_mapped else 0
        memory = torch.empty(
            tensor.size + room, dtype=torch.uint8, pin_memory=self._stream is not None
        )
        begin = (start - memory.data_ptr()) % room if room else 0
        values = memory[begin : begin + tensor.size]
        file.seek(start)
        if file.readinto(values.numpy().data) < tensor.size:
            raise ModelError(
                f"{tensor.path} became shorter while sleb read it.",
                hint="Copy or download it again.",
            )
        # torch views bytes as numbers only at multiples of their size.
        values = values.clone() if begin % dtype.itemsize else values
        return values.view(dtype).view(tensor.shape)

    def _drop(self, *blocks: int) -> None:
        synchronize(self._device)  # it may still compute with these weights
        for block in blocks:
            for name, tensor in self._empty[block].items():
                path, _, leaf = name.rpartition(".")
                setattr(self.modules[block].get_submodule(path), leaf, tensor)

    def _put_in_place(self, tensors: Mapping[str, Tensor]) -> Any:
        """Let transformers make parameters of these tensors of the files; return its loading info."""
        with translate_transformers_errors(f"the weights of {self._architecture.source.id}"):
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self._config)
        problem = loading_problem(info.to_dict(), "mismatched")
        if problem or info.conversion_errors:
            raise self._misfit(problem or str(next(iter(info.conversion_errors.values()))))
        return info

    def _load_outside(self, stored: Sequence[StoredTensor]) -> None:
        """Put everything outside the blocks in place, and give the blocks the buffers that no file
        holds.
        """
        info = self._put_in_place(self._read(stored))
        inside = {
            f"{self._architecture.adapter.blocks_path}.{name}" for name in self.modules.state_dict()
        }
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
