"""The weight files of a checkpoint to be written: planned from headers alone, then filled byte by byte.

No tensor is decoded, so any data type goes through, also one that nobody here knows; and no more than a buffer is in
memory, whatever the model's size. Only a cast, and a pickle, take one tensor at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch

from sleb_cli.atomic import require_space, to_json
from sleb_cli.engine.files.copying import Advance, copy_range, read_range, reading, share_blocks, write_all
from sleb_cli.engine.files.slices import Cut
from sleb_cli.engine.files.weights import (
    DTYPE_NAMES,
    SAFETENSORS,
    TORCH_DTYPES,
    Header,
    StoredTensor,
    WeightFiles,
    load_pickle,
)
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the checkpoint: its name there, what its bytes are made from, and what is done to them.

    Attributes:
        name: its name.
        stored: where its bytes come from.
        cast: the data type to cast them to.
        cut: what of it stays, where it is not all.
        value: what stands in its place, of the stored shape, where it is new.
    """

    name: str
    stored: StoredTensor
    cast: torch.dtype | None = None
    cut: Cut | None = None
    value: torch.Tensor | None = None

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those that are stored."""
        return self.cast is None and self.cut is None and self.value is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.cut.shape(self.stored.shape) if self.cut else self.stored.shape

    @property
    def dtype(self) -> str:
        """Its data type as safetensors writes it."""
        return DTYPE_NAMES[self.cast] if self.cast else self.stored.dtype

    @property
    def size(self) -> int:
        """Its bytes."""
        if self.cast:
            return math.prod(self.shape) * self.cast.itemsize
        if self.cut and self.stored.size:
            return self.stored.size * math.prod(self.shape) // math.prod(self.stored.shape)
        return self.stored.size


@dataclass(frozen=True)
class Shard:
    """A weight file to be written; `same_as` is a file that already is what it will be."""

    tensors: tuple[NewTensor, ...]
    metadata: dict[str, str]
    same_as: Path | None = None

    @property
    def size(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.size for tensor in self.tensors)


def new_tensor(name: str, stored: StoredTensor, dtype: torch.dtype | None, cut: Cut | None = None) -> NewTensor:
    """Give a tensor its new name; `dtype` applies where it holds floating-point numbers of another type."""
    own = TORCH_DTYPES.get(stored.dtype)
    changes = dtype is not None and own is not None and own.is_floating_point and own is not dtype
    return NewTensor(name, stored, dtype if changes else None, cut)


def plan_shards(weights: WeightFiles, tensors: Iterable[NewTensor], max_bytes: int) -> list[Shard]:
    """Divide the tensors into files of at most `max_bytes`, along the borders that the source's files have.

    A file that keeps all it had is taken over as it is. What remains of the others is joined with its neighbour where
    both together are no larger than the source's largest. A tensor larger than `max_bytes` has a file of its own.
    """
    remaining: dict[Path, list[NewTensor]] = {header.path: [] for header in weights.headers}
    for tensor in tensors:
        remaining[tensor.stored.path].append(tensor)
    largest = max(sum(tensor.size for tensor in header.tensors) for header in weights.headers)
    shards: list[Shard] = []
    for header in weights.headers:
        for shard in _shards_of(header, remaining[header.path], max_bytes):
            last = shards[-1] if shards else shard
            rewritten = not last.same_as and not shard.same_as
            if shards and rewritten and last.size + shard.size <= min(max_bytes, largest):
                shards[-1] = Shard(last.tensors + shard.tensors, shard.metadata | last.metadata)
            else:
                shards.append(shard)
    return shards


def _shards_of(header: Header, tensors: Sequence[NewTensor], max_bytes: int) -> Iterator[Shard]:
    """Give the shards that hold what remains of one file."""
    metadata = {"format": "pt"} | header.metadata
    as_before = [(tensor.name, tensor.stored) for tensor in tensors if tensor.is_copy]
    if (
        header.path.suffix == ".safetensors"
        and tensors
        and as_before == [(stored.name, stored) for stored in header.tensors]
        and sum(stored.size for stored in header.tensors) <= max_bytes
    ):
        yield Shard(tuple(tensors), header.metadata, same_as=header.path)
        return
    packed: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        if packed and size + tensor.size > max_bytes:
            yield Shard(tuple(packed), metadata)
            packed, size = [], 0
        packed.append(tensor)
        size += tensor.size
    if packed:
        yield Shard(tuple(packed), metadata)


def write_weights(folder: Path, shards: Sequence[Shard], other_bytes: int, notify: Notify) -> int:
    """Write the shards and, where there are several, their index; give the bytes of all tensors.

    `other_bytes` are to be written beside them: all must have room before anything is copied.

    Raises:
        OutputError: they have not.
        ModelError: a source file cannot be read.
    """
    names = shard_names(len(shards))
    total = sum(shard.size for shard in shards)
    task = "Writing weights"
    notify(TaskStarted(task, total, "B"))
    shared = {
        name: share_blocks(shard.same_as, folder / name)
        for name, shard in zip(names, shards, strict=True)
        if shard.same_as
    }
    to_write = [(name, shard) for name, shard in zip(names, shards, strict=True) if not shared.get(name)]
    require_space(folder, sum(shard.size for _, shard in to_write) + other_bytes)
    notify(TaskAdvanced(task, total - sum(shard.size for _, shard in to_write)))
    for name, shard in to_write:
        _write_shard(folder / name, shard, lambda count: notify(TaskAdvanced(task, count)))
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{SAFETENSORS}.index.json").write_text(to_json(index), encoding="utf-8")
    notify(TaskFinished(task))
    links = list(shared.values()).count("hard link")
    if links:
        notify(
            Notice(
                f"{links} of {len(shards)} weight files did not change and are hard links to the model's own: "
                "do not edit them in place."
            )
        )
    return total


def shard_names(count: int) -> list[str]:
    """Name the files as transformers does."""
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, shard: Shard, advance: Advance) -> None:
    # The widest first, as safetensors itself writes them: so each lies at a multiple of its own width.
    tensors = sorted(shard.tensors, key=lambda tensor: -_width(tensor))
    with path.open("xb", buffering=0) as target:
        write_all(target, _header(tensors, shard.metadata))
        for source, group in groupby(tensors, key=lambda tensor: tensor.stored.path):
            _write_tensors(source, list(group), target, advance)


def _width(tensor: NewTensor) -> int:
    return tensor.size // max(1, math.prod(tensor.shape))


def _header(tensors: Sequence[NewTensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end += tensor.size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensors(source: Path, tensors: Sequence[NewTensor], target: BinaryIO, advance: Advance) -> None:
    """Append tensors that come from one file."""
    if source.suffix != ".safetensors" or not all(tensor.is_copy for tensor in tensors):
        for _, parts in contents(source, tensors):
            for part in parts:
                write_all(target, part)
                advance(len(part))
        return
    with reading(source):
        original = source.open("rb", buffering=0)
    with original:
        for start, count in _stretches(tensors):
            copy_range(original, start, count, target, advance)


def _stretches(tensors: Sequence[NewTensor]) -> list[tuple[int, int]]:
    """Give where the tensors' bytes are, as (start, count); those that follow each other in one stretch."""
    stretches: list[tuple[int, int]] = []
    for tensor in tensors:
        start, before = tensor.stored.start or 0, stretches[-1] if stretches else None
        if before and sum(before) == start:
            stretches[-1] = (before[0], before[1] + tensor.size)
        else:
            stretches.append((start, tensor.size))
    return stretches


def contents(source: Path, tensors: Sequence[NewTensor]) -> Iterator[tuple[NewTensor, Iterable[memoryview]]]:
    """Give, for each of these tensors of one file, the bytes that it has in the checkpoint, part by part.

    Raises:
        ModelError: the file cannot be read.
    """
    if source.suffix != ".safetensors":
        pickled = load_pickle(source)
        for tensor in tensors:
            whole = pickled[tensor.stored.name] if tensor.value is None else tensor.value
            yield tensor, [_bytes_of(tensor.cut.of_tensor(whole) if tensor.cut else whole, TORCH_DTYPES[tensor.dtype])]
        return
    with reading(source):
        original = source.open("rb", buffering=0)
    with original:
        for tensor in tensors:
            if tensor.value is not None:
                yield tensor, [_bytes_of(tensor.value, TORCH_DTYPES[tensor.dtype])]
                continue
            parts = read_range(original, tensor.stored.start or 0, tensor.stored.size)
            if tensor.cut:
                parts = tensor.cut.of_bytes(parts, tensor.stored.shape, tensor.stored.size)
            if tensor.cast and tensor.stored.size:
                raw = bytearray().join(parts)
                yield tensor, [_bytes_of(torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.stored.dtype]), tensor.cast)]
            else:
                yield tensor, parts


def _bytes_of(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.to("cpu", dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
