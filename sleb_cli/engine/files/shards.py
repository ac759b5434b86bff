"""Plan the weight files of a checkpoint from headers alone, then copy their bytes.

A tensor that stays as it is is not decoded, so any data type can be copied, even an unknown one, in
one buffer of memory. Only a tensor that is cast, is cut along another axis than the first, has a
new value or comes from a pickle is held whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch

from sleb_cli.atomic import to_json
from sleb_cli.engine.files.copying import ReportBytes, copy_range, reading
from sleb_cli.engine.files.headers import StoredTensor
from sleb_cli.engine.files.pickles import DTYPE_NAMES, TORCH_DTYPES
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.files.tensors import read_tensors
from sleb_cli.engine.files.weights import SAFETENSORS, WeightFiles
from sleb_cli.events import Notify, task

WEIGHTS_TASK = "Writing weights"
INDEX = f"{SAFETENSORS}.index.json"
"""The file that says which weight file holds which tensor, if there are several."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the new checkpoint, and how its bytes are made.

    Attributes:
        stored: the tensor that its bytes come from.
        cast: the data type to cast to, if it changes.
        slices: the slices to keep, if not all; each cut is of the tensor that the one before left.
        value: a new value of the stored shape, if it changes.
    """

    name: str
    stored: StoredTensor
    cast: torch.dtype | None = None
    slices: tuple[Slices, ...] = ()
    value: torch.Tensor | None = None

    @property
    def ranges(self) -> list[tuple[int, int]] | None:
        """The offsets and sizes of its bytes in a file; None if they must be made."""
        stored = self.stored
        if self.cast or self.value is not None or stored.start is None or len(self.slices) > 1:
            return None
        if not self.slices:
            return [(stored.start, stored.size)]
        ranges = self.slices[0].ranges(stored.shape, stored.size)
        if ranges is None:
            return None
        return [(stored.start + offset, size) for offset, size in ranges]

    def changed(self, value: torch.Tensor) -> torch.Tensor:
        """Return the stored or new value as in the new checkpoint."""
        for slices in self.slices:
            value = slices.cut(value)
        return value.to("cpu", TORCH_DTYPES.get(self.dtype, value.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape after the cuts."""
        shape = self.stored.shape
        for slices in self.slices:
            shape = slices.shape(shape)
        return shape

    @property
    def dtype(self) -> str:
        """Its data type, as safetensors names it."""
        return DTYPE_NAMES[self.cast] if self.cast else self.stored.dtype

    @property
    def size(self) -> int:
        """Its size in bytes."""
        if self.cast:
            return math.prod(self.shape) * self.cast.itemsize
        return self.stored.size * math.prod(self.shape) // max(1, math.prod(self.stored.shape))


@dataclass(frozen=True)
class Shard:
    """A weight file to write."""

    tensors: tuple[NewTensor, ...]
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """The size of its tensors in bytes."""
        return sum(tensor.size for tensor in self.tensors)


def new_tensor(
    name: str,
    stored: StoredTensor,
    dtype: torch.dtype | None,
    slices: tuple[Slices, ...],
    value: torch.Tensor | None,
) -> NewTensor:
    """Return the tensor under its new name.

    It is cast to `dtype` if it holds floating-point numbers of another type.
    """
    before = TORCH_DTYPES.get(stored.dtype)
    is_cast = before is not None and before.is_floating_point and before is not dtype
    return NewTensor(name, stored, dtype if is_cast else None, slices, value)


def plan_shards(
    weights: WeightFiles, tensors: Iterable[NewTensor], max_bytes: int
) -> dict[str, Shard]:
    """Plan files like the source's, split where one exceeds `max_bytes`; return them by name.

    A tensor larger than `max_bytes` gets a file of its own.
    """
    by_file: dict[Path, list[NewTensor]] = {header.path: [] for header in weights.headers}
    for tensor in tensors:
        by_file[tensor.stored.path].append(tensor)
    shards = []
    for header in weights.headers:
        metadata = {"format": "pt"} | header.metadata
        for group in _split(by_file[header.path], max_bytes):
            shards.append(Shard(tuple(group), metadata))
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    named = {}
    for number, shard in enumerate(shards, start=1):
        named[f"model-{number:05d}-of-{len(shards):05d}.safetensors"] = shard
    return named


def _split(tensors: Iterable[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Split tensors into groups of at most `max_bytes`, or of one tensor."""
    groups: list[list[NewTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.size > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size
    return groups


def write_weights(folder: Path, shards: Mapping[str, Shard], notify: Notify) -> None:
    """Write the shards and, if there are several, their index."""
    total = sum(shard.size for shard in shards.values())
    with task(notify, WEIGHTS_TASK, total, "B") as advance:
        for name, shard in shards.items():
            # Widest elements first, as safetensors writes them, so each tensor is aligned to its
            # elements.
            tensors = sorted(shard.tensors, key=_element_bytes, reverse=True)
            with (folder / name).open("xb") as target:
                target.write(_header(tensors, shard.metadata))
                for source, group in groupby(tensors, key=lambda tensor: tensor.stored.path):
                    _write_tensors(source, list(group), target, advance)
        if len(shards) > 1:
            (folder / INDEX).write_text(index_of(shards), encoding="utf-8", newline="\n")


def index_of(shards: Mapping[str, Shard]) -> str:
    """Return the text of the index of several weight files."""
    weight_map = {}
    for name, shard in shards.items():
        for tensor in shard.tensors:
            weight_map[tensor.name] = name
    total = sum(shard.size for shard in shards.values())
    return to_json(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _element_bytes(tensor: NewTensor) -> int:
    return tensor.size // max(1, math.prod(tensor.shape))


def _header(tensors: Sequence[NewTensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        end = start + tensor.size
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned, too
    return len(text).to_bytes(8, "little") + text


def _write_tensors(
    source: Path, tensors: Sequence[NewTensor], target: BinaryIO, report: ReportBytes
) -> None:
    to_decode = []
    for tensor in tensors:
        if tensor.ranges is None and tensor.value is None:
            to_decode.append(tensor.stored.name)
    decoded = read_tensors(source, to_decode)
    with reading(source):
        original = source.open("rb")
    with original:
        for tensor in tensors:
            if tensor.ranges is not None:
                for start, size in tensor.ranges:
                    copy_range(original, start, size, target, report)
                continue
            value = next(decoded) if tensor.value is None else tensor.value
            target.write(_bytes_of(tensor.changed(value)))
            report(tensor.size)


def _bytes_of(value: torch.Tensor) -> bytes | memoryview:
    if not value.numel():
        return b""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
