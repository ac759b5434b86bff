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
from functools import reduce
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from sleb_cli.atomic import to_json
from sleb_cli.engine.files.copying import ReportBytes, copy_range, reading
from sleb_cli.engine.files.headers import Header, StoredTensor
from sleb_cli.engine.files.pickles import DTYPE_NAMES, TORCH_DTYPES
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.files.tensors import read_tensors
from sleb_cli.engine.files.weights import SAFETENSORS, WeightFiles
from sleb_cli.events import Notify, task

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
        """The offsets and sizes of its bytes in a safetensors file; None if they are not there as
        they are.
        """
        stored = self.stored
        if self.cast or self.value is not None or stored.start is None or len(self.slices) > 1:
            return None
        ranges = (
            self.slices[0].ranges(stored.shape, stored.size) if self.slices else [(0, stored.size)]
        )
        return ranges and [(stored.start + offset, size) for offset, size in ranges]

    def changed(self, value: torch.Tensor) -> torch.Tensor:
        """Return the stored or new value as in the new checkpoint."""
        for slices in self.slices:
            value = slices.cut(value)
        return value.to("cpu", TORCH_DTYPES.get(self.dtype, value.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape after the cuts."""
        return reduce(lambda shape, slices: slices.shape(shape), self.slices, self.stored.shape)

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
    """Return the tensor under its new name, cast to `dtype` if it holds floating-point numbers of
    another type.
    """
    before = TORCH_DTYPES.get(stored.dtype)
    changes = (
        dtype is not None
        and before is not None
        and before.is_floating_point
        and before is not dtype
    )
    return NewTensor(name, stored, dtype if changes else None, slices, value)


def plan_shards(
    weights: WeightFiles, tensors: Iterable[NewTensor], max_bytes: int
) -> dict[str, Shard]:
    """Plan files like the source's, split where one exceeds `max_bytes`; return them by name.

    A tensor larger than `max_bytes` gets a file of its own.
    """
    remaining: dict[Path, list[NewTensor]] = {header.path: [] for header in weights.headers}
    for tensor in tensors:
        remaining[tensor.stored.path].append(tensor)
    files: list[tuple[list[NewTensor], Header]] = []
    for header in weights.headers:
        size = math.inf
        for tensor in remaining[header.path]:
            if size + tensor.size > max_bytes:
                files.append(([], header))
                size = 0
            files[-1][0].append(tensor)
            size += tensor.size
    shards = [Shard(tuple(packed), {"format": "pt"} | header.metadata) for packed, header in files]
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_weights(folder: Path, shards: Mapping[str, Shard], notify: Notify) -> None:
    """Write the shards and, if there are several, their index."""
    total = sum(shard.size for shard in shards.values())
    with task(notify, "Writing weights", total, "B") as advance:
        for name, shard in shards.items():
            _write_shard(folder / name, shard, advance)
        if len(shards) > 1:
            (folder / INDEX).write_text(index_of(shards), encoding="utf-8", newline="\n")


def index_of(shards: Mapping[str, Shard]) -> str:
    """Return the text of the index of several weight files."""
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard.tensors}
    total = sum(shard.size for shard in shards.values())
    return to_json(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _write_shard(path: Path, shard: Shard, report: ReportBytes) -> None:
    # Widest elements first, as safetensors writes them, so that each tensor is aligned to its
    # element size.
    tensors = sorted(
        shard.tensors, key=lambda tensor: -(tensor.size // max(1, math.prod(tensor.shape)))
    )
    with path.open("xb") as target:
        target.write(_header(tensors, shard.metadata))
        for source, group in groupby(tensors, key=lambda tensor: tensor.stored.path):
            _write_tensors(source, list(group), target, report)


def _header(tensors: Sequence[NewTensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    offsets_of_all = pairwise(accumulate((tensor.size for tensor in tensors), initial=0))
    for tensor, offsets in zip(tensors, offsets_of_all, strict=True):
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned, too
    return len(text).to_bytes(8, "little") + text


def _write_tensors(
    source: Path, tensors: Sequence[NewTensor], target: BinaryIO, report: ReportBytes
) -> None:
    changed = [
        tensor.stored.name for tensor in tensors if tensor.ranges is None and tensor.value is None
    ]
    decoded = read_tensors(source, changed)
    with reading(source):
        original = source.open("rb")
    with original:
        for tensor in tensors:
            ranges = tensor.ranges
            for start, size in ranges or ():
                copy_range(original, start, size, target, report)
            if ranges is None:
                value = tensor.changed(
                    next(decoded) if tensor.value is None else tensor.value
                ).contiguous()
                target.write(
                    value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b""
                )
                report(tensor.size)
