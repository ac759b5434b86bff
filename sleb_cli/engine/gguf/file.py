"""The GGUF format: header values are kept byte for byte, and tensors are copied unchanged.

`gguf.GGUFReader` keeps an array for each item of an array. So it takes half a minute and 600 MB for
a vocabulary like Llama 3's, and fills the memory if a file lies about its counts. Here, it takes a
second.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES

from sleb_cli.engine.files.copying import ReportBytes, copy_range, reading, runs
from sleb_plugins.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_INT32 = 5
STRING = 8
ARRAY = 9
# The number types of the format, by the codes that `struct` and NumPy share.
FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One key of the metadata.

    Attributes:
        data: the bytes of its value in the file, after the number of its type.
    """

    key: str
    type: int
    data: bytes
    # Texts are bytes, since tokens may be incomplete UTF-8. Lists of numbers are arrays.
    value: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        start: the offset of its bytes in the file.
        size: in bytes.
        rows: to copy, ascending; None for all.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int
    rows: tuple[int, ...] | None = None

    def only(self, rows: tuple[int, ...]) -> GgufTensor:
        """Return the tensor with only these rows, or items of a list."""
        count = self.shape[-1]
        shape = (*self.shape[:-1], len(rows))
        return replace(self, shape=shape, size=self.size // count * len(rows), rows=rows)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The offsets and sizes of the bytes to copy: one for each run of rows."""
        if self.rows is None:
            return [(self.start, self.size)]
        width = self.size // len(self.rows)
        return [(self.start + first * width, length * width) for first, length in runs(self.rows)]


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    version: int
    entries: tuple[Entry, ...]
    tensors: tuple[GgufTensor, ...]

    def get(self, key: str) -> Any:
        """Return the value of a key in Python's types, or None."""
        value = next((entry.value for entry in self.entries if entry.key == key), None)
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, list):
            return [text.decode(errors="replace") for text in value]
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return value

    def setting(self, key: str) -> Any:
        """Return the value of one of the architecture's own keys, such as "block_count"."""
        return self.get(f"{self.architecture}.{key}")

    def count(self, key: str) -> int | None:
        """Return one of the architecture's own keys that counts something, or None."""
        count = self.setting(key)
        # The exact type: a bool is an int, too.
        if count is not None and (type(count) is not int or count < 0):
            raise ModelError(
                f"{self.path} says {count!s:.60} for {self.architecture}.{key}, which is not a "
                f"valid count.",
                hint="Download the file again.",
            )
        return count

    def with_count(self, key: str, value: int) -> GgufFile:
        """Return the header with another number under one of the architecture's own keys."""
        key = f"{self.architecture}.{key}"
        entries = list(self.entries)
        for position, entry in enumerate(entries):
            if entry.key == key:
                entries[position] = with_value(entry, value)
        return replace(self, entries=tuple(entries))

    @property
    def parameters(self) -> int:
        """The number of weights, whatever they are packed in."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, the first part of the architecture's own keys."""
        return str(self.get("general.architecture") or "")

    def padding(self, size: int) -> int:
        """Return the number of zeros from `size` bytes to the next multiple of the alignment."""
        return -size % int(self.get("general.alignment") or _DEFAULT_ALIGNMENT)


def entry_of_integers(key: str, values: Iterable[int]) -> Entry:
    """Return an entry with an array of int32."""
    numbers = np.array(list(values), "<i4")
    return Entry(key, ARRAY, struct.pack("<IQ", _INT32, len(numbers)) + numbers.tobytes(), numbers)


def with_value(entry: Entry, value: int) -> Entry:
    """Return the entry with another integer of the same type."""
    return replace(entry, data=struct.pack(f"<{FORMATS[entry.type]}", value), value=value)


def with_items(entry: Entry, indices: list[int]) -> Entry:
    """Return the entry of an array with the items at `indices`, in that order."""
    if isinstance(entry.value, np.ndarray):
        value: Any = entry.value[indices]
        items = value.tobytes()
    else:
        value = [entry.value[index] for index in indices]
        items = b"".join(map(_text, value))
    # The first four bytes are the type of the items.
    return replace(
        entry, data=entry.data[:4] + struct.pack("<Q", len(indices)) + items, value=value
    )


@dataclass
class _Cursor:
    data: bytes | mmap.mmap
    path: Path
    offset: int = 0  # in bytes

    def require(self, condition: bool) -> None:
        if not condition:
            raise ModelError(
                f"{self.path} is truncated, or is not a GGUF file.", hint="Download the file again."
            )

    def take(self, size: int) -> bytes:
        start = self.offset
        self.offset += size
        self.require(self.offset <= len(self.data))
        return self.data[start : self.offset]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> bytes:
        return self.take(int.from_bytes(self.take(8), "little"))

    def name(self) -> str:
        raw = self.text()
        name = raw.decode(errors="replace")
        self.require(name.encode() == raw)
        return name

    def value(self, type_: int) -> Any:
        """Read a number, a text in bytes, an array of numbers, or a list of texts in bytes."""
        if type_ == STRING:
            return self.text()
        if type_ in FORMATS:
            return self.number(FORMATS[type_])
        self.require(type_ == ARRAY)
        element = self.number("I")
        count = self.number("Q")
        self.require(element == STRING or element in FORMATS)
        if element == STRING:
            return [self.text() for _ in range(count)]
        kind = np.dtype(f"<{FORMATS[element]}")
        return np.frombuffer(self.take(count * kind.itemsize), kind)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that all tensors are there and none overlap."""
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint="Check the path.")
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data: bytes | mmap.mmap = b""
        if size:
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    cursor = _Cursor(data, path)
    cursor.require(cursor.take(4) == _MAGIC)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"{path} is a GGUF file of version {version}; sleb reads versions 2 and 3, "
            f"little-endian.",
            hint="Convert the model again with a current llama.cpp.",
        )
    tensor_count = cursor.number("Q")
    entry_count = cursor.number("Q")
    header = GgufFile(path, version, _read_entries(cursor, entry_count), ())
    tensors = _read_tensors(cursor, tensor_count)
    alignment = header.get("general.alignment")
    cursor.require(alignment is None or (type(alignment) is int and alignment > 0))
    parts = header.get("split.count") or 1
    if parts != 1:
        raise ModelError(
            f"{path} is one of {parts!s:.60} parts of a model.",
            hint="Merge the parts first: `llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf`.",
        )
    begin = cursor.offset + header.padding(cursor.offset)
    placed = tuple(replace(tensor, start=begin + tensor.start) for tensor in tensors)
    end = 0
    for tensor in sorted(placed, key=lambda tensor: (tensor.start, tensor.size)):
        cursor.require(tensor.start >= end and not header.padding(tensor.start))
        end = tensor.start + tensor.size
    cursor.require(end <= size)
    return replace(header, tensors=placed)


def _read_entries(cursor: _Cursor, count: int) -> tuple[Entry, ...]:
    entries: dict[str, Entry] = {}
    for _ in range(count):
        key = cursor.name()
        type_ = cursor.number("I")
        start = cursor.offset
        # Names must differ, so a false count fails soon, even in a file of zeros.
        cursor.require(key not in entries)
        value = cursor.value(type_)
        entries[key] = Entry(key, type_, cursor.data[start : cursor.offset], value)
    return tuple(entries.values())


def _read_tensors(cursor: _Cursor, count: int) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = cursor.name()
        rank = cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(rank))
        type_ = cursor.number("I")
        offset = cursor.number("Q")
        if type_ not in GGML_QUANT_SIZES:
            raise ModelError(
                f"The tensor {name:.60} in {cursor.path} has type {type_}, which the installed "
                "gguf package does not support.",
                hint="Upgrade with `pip install --upgrade gguf`. If that does not help, the file "
                "is damaged.",
            )
        packed, packed_bytes = GGML_QUANT_SIZES[type_]
        cursor.require(not shape or shape[0] % packed == 0)
        cursor.require(name not in tensors)
        size = math.prod(shape) * packed_bytes // packed
        tensors[name] = GgufTensor(name, shape, type_, offset, size)
    return tuple(tensors.values())


def write_gguf(file: GgufFile, output: Path, report: ReportBytes) -> None:
    """Write a file with this header, and copy the values of each tensor from `file.path`."""
    with reading(file.path):
        source = file.path.open("rb")
    with source, output.open("wb") as target:
        target.write(_header(file))
        for tensor in file.tensors:
            for start, size in tensor.ranges:
                copy_range(source, start, size, target, report)
            target.write(bytes(file.padding(tensor.size)))


def gguf_size(file: GgufFile) -> int:
    """Return the size in bytes of the file that `write_gguf` writes."""
    size = len(_header(file))
    for tensor in file.tensors:
        size += tensor.size + file.padding(tensor.size)
    return size


def _header(file: GgufFile) -> bytes:
    """Return all bytes before the first tensor's values, with padding."""
    parts = [_MAGIC, struct.pack("<IQQ", file.version, len(file.tensors), len(file.entries))]
    for entry in file.entries:
        parts += [_text(entry.key.encode()), struct.pack("<I", entry.type), entry.data]
    offset = 0
    for tensor in file.tensors:
        rank = len(tensor.shape)
        parts += [
            _text(tensor.name.encode()),
            struct.pack(f"<I{rank}QIQ", rank, *tensor.shape, tensor.type, offset),
        ]
        offset += tensor.size + file.padding(tensor.size)
    header = b"".join(parts)
    return header + bytes(file.padding(len(header)))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
