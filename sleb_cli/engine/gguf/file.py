"""The GGUF format: header values are kept byte for byte, and tensors are copied unchanged or given new values.

`gguf.GGUFReader` keeps an array for each item of an array. So it takes half a minute and 600 MB for a vocabulary like
Llama 3's, and fills the memory if a file lies about its counts. Here, it takes half a second.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sleb_cli.engine.files.copying import ReportBytes, copy_range, reading, write_all
from sleb_plugins.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_UINT32, _INT32, _STRING, ARRAY = 4, 5, 8, 9
# As `struct` and NumPy name them.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# No model comes near these limits, so a file that lies takes neither memory nor time.
_LONGEST_HEADER = 128 << 20
_MOST_ITEMS = 1 << 22
_LONGEST_NAME = 256
_LARGEST_ALIGNMENT = 1 << 20
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Entry:
    """One key of the metadata; `data` holds the bytes of its value in the file, after the number of its type."""

    key: str
    type: int
    data: bytes


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, with the offset of its values in the file, and their size in bytes.

    A tensor with `values` is written with these instead of those in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int
    values: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file; `order` is the byte order, as in `struct`."""

    path: Path
    order: str
    version: int
    entries: tuple[Entry, ...]
    tensors: tuple[GgufTensor, ...]

    @cached_property
    def _by_key(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in self.entries}

    def get(self, key: str) -> Any:
        """Return the value of a key in Python's types, or None if there is no such key."""
        entry = self._by_key.get(key)
        value = None if entry is None else _value(entry, self.order)
        if isinstance(value, np.ndarray):
            return value.tolist()
        # Tokens may be incomplete UTF-8.
        if isinstance(value, list):
            return [text.decode(errors="replace") for text in value]
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def own(self, key: str) -> Any:
        """Return the value of one of the architecture's own keys, such as "block_count"."""
        return self.get(f"{self.architecture}.{key}")

    def count(self, key: str) -> int | None:
        """Return one of the architecture's own keys that counts something, or None if there is no such key.

        Raises:
            ModelError: it is no whole number of 0 or more.
        """
        found = self.own(key)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
            raise ModelError(
                f"{self.path} says {_shown(found)} for {self.architecture}.{key}, which is not a count.",
                hint="Download the file again.",
            )
        return found

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, which is the first part of the architecture's own keys."""
        return str(self.get("general.architecture") or "")

    @property
    def alignment(self) -> int:
        """The alignment of each tensor in bytes."""
        found = self.get("general.alignment")
        return 32 if found is None else int(found)


def entry_of_integers(key: str, values: Iterable[int], order: str) -> Entry:
    """Return an entry with an array of int32."""
    numbers = list(values)
    return Entry(key, ARRAY, struct.pack(f"{order}IQ{len(numbers)}i", _INT32, len(numbers), *numbers))


def with_value(entry: Entry, value: int, order: str) -> Entry:
    """Return the entry with another integer of the same type."""
    return replace(entry, data=struct.pack(order + _FORMATS[entry.type], value))


def with_items(entry: Entry, places: list[int], order: str) -> Entry:
    """Return the entry of an array with only the items at `places`, in that order."""
    value = _value(entry, order)
    items = (
        value[places].tobytes() if isinstance(value, np.ndarray) else b"".join(_text(value[p], order) for p in places)
    )
    return replace(entry, data=entry.data[:4] + struct.pack(order + "Q", len(places)) + items)


def _value(entry: Entry, order: str) -> Any:
    return _Cursor(entry.data, order, f"The value of {entry.key}").value(entry.type)


class _Cursor:
    """Reads numbers, strings and arrays from bytes in sequence."""

    def __init__(self, data: bytes | mmap.mmap, order: str, what: str) -> None:
        self.data, self.order, self.what = data, order, what
        self.place = 0

    def take(self, size: int) -> bytes:
        self.require(size <= len(self.data) - self.place)
        self.place += size
        return self.data[self.place - size : self.place]

    def require(self, condition: bool) -> None:
        if not condition:
            raise _broken(self.what)

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize(code)))[0]

    def name(self) -> str:
        size = self.number("Q")
        self.require(size <= _LONGEST_NAME)
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise _broken(self.what) from error

    def value(self, type_: int) -> Any:
        """Read a number, the bytes of a string, an array of numbers, or a list of the bytes of strings."""
        if type_ == _STRING:
            return self.take(self.number("Q"))
        if type_ != ARRAY:
            self.require(type_ in _FORMATS)
            return self.number(_FORMATS[type_])
        element, count = self.number("I"), self.number("Q")
        self.require(count <= _MOST_ITEMS and (element == _STRING or element in _FORMATS))
        if element == _STRING:
            return self.strings(count)
        kind = np.dtype(self.order + _FORMATS[element])
        return np.frombuffer(self.take(count * kind.itemsize), kind)

    def strings(self, count: int) -> list[bytes]:
        # A vocabulary has a few hundred thousand: `take` and `number` would need a second for them.
        length, data, place = struct.Struct(self.order + "Q"), self.data, self.place
        found = []
        for _ in range(count):
            self.require(place <= len(data) - length.size)
            (size,) = length.unpack_from(data, place)
            place += length.size + size
            self.require(place <= len(data))
            found.append(data[place - size : place])
        self.place = place
        return found


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that the file holds all tensors, none of them in another's place.

    Raises:
        ModelError: the file is missing, truncated, damaged or not a GGUF file, has an unknown version or type, or is
            one part of a split model.
    """
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint="Check the path.")
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), min(size, _LONGEST_HEADER), access=mmap.ACCESS_READ) if size else b""
    cursor = _Cursor(data, "<", str(path))
    cursor.require(cursor.take(4) == _MAGIC)
    version = cursor.number("I")
    if version & 0xFFFF == 0:  # the other byte order
        cursor.order, cursor.place = ">", 4
        version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"{path} is a GGUF file of version {version}; sleb reads versions 2 and 3.",
            hint="Convert the model again with a current llama.cpp.",
        )
    tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
    # Names must differ, so a false count fails soon, even in a file of zeros.
    entries = _by_name(cursor, (_entry(cursor) for _ in range(entry_count)), lambda entry: entry.key)
    tensors = _by_name(cursor, (_tensor(cursor) for _ in range(tensor_count)), lambda tensor: tensor.name)
    header = GgufFile(path, cursor.order, version, entries, ())
    _require_readable(header, cursor)
    begin = cursor.place + -cursor.place % header.alignment
    tensors = tuple(replace(tensor, start=begin + tensor.start) for tensor in tensors)
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        cursor.require(end <= tensor.start <= size - tensor.size and tensor.start % header.alignment == 0)
        end = tensor.start + tensor.size
    return replace(header, tensors=tensors)


_T = TypeVar("_T")


def _by_name(cursor: _Cursor, found: Iterator[_T], name: Callable[[_T], str]) -> tuple[_T, ...]:
    named: dict[str, _T] = {}
    for each in found:
        cursor.require(name(each) not in named)
        named[name(each)] = each
    return tuple(named.values())


def _entry(cursor: _Cursor) -> Entry:
    key, type_ = cursor.name(), cursor.number("I")
    start = cursor.place
    cursor.value(type_)
    return Entry(key, type_, cursor.data[start : cursor.place])


def _tensor(cursor: _Cursor) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, rank = cursor.name(), cursor.number("I")
    cursor.require(rank <= _MOST_DIMENSIONS)
    shape = tuple(cursor.number("Q") for _ in range(rank))
    type_, offset = cursor.number("I"), cursor.number("Q")
    try:
        packed, packed_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"The tensor {_shown(name)} in {cursor.what} has type {type_}, which the installed gguf package does not "
            "support.",
            hint="Upgrade with `pip install --upgrade gguf`. If that does not help, the file is damaged.",
        ) from error
    cursor.require(not shape or shape[0] % packed == 0)
    return GgufTensor(name, shape, type_, offset, math.prod(shape) * packed_bytes // packed)


def _require_readable(header: GgufFile, cursor: _Cursor) -> None:
    """Check the keys that say how to read the rest."""
    types = {entry.key: entry.type for entry in header.entries}
    cursor.require(types.get("general.alignment", _UINT32) == _UINT32)
    cursor.require(types.get("general.architecture", _STRING) == _STRING)
    cursor.require(len(header.architecture) <= _LONGEST_NAME)
    cursor.require(0 < header.alignment <= _LARGEST_ALIGNMENT and header.alignment.bit_count() == 1)
    parts = header.get("split.count") or 1
    if parts != 1:
        raise ModelError(
            f"{header.path} is one of {_shown(parts)} parts of a model.",
            hint="Merge the parts first: `llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf`.",
        )


def write_gguf(file: GgufFile, output: Path, report: ReportBytes) -> None:
    """Write a file with this header, and copy the values of each tensor from offset `start` of `file.path`.

    Raises:
        ModelError: `file.path` cannot be read, or has become shorter.
    """
    with reading(file.path):
        source = file.path.open("rb", buffering=0)
    with source, output.open("wb", buffering=0) as target:
        write_all(target, _header(file))
        for tensor in file.tensors:
            if tensor.values is None:
                copy_range(source, tensor.start, tensor.size, target, report)
            else:
                write_all(target, tensor.values)
                report(tensor.size)
            write_all(target, bytes(-tensor.size % file.alignment))


def gguf_size(file: GgufFile) -> int:
    """Return how many bytes `write_gguf` writes."""
    return len(_header(file)) + sum(_aligned_size(file, tensor) for tensor in file.tensors)


def _aligned_size(file: GgufFile, tensor: GgufTensor) -> int:
    return tensor.size + -tensor.size % file.alignment


def _header(file: GgufFile) -> bytes:
    """Return all bytes before the first tensor's values, with padding."""
    order = file.order
    parts = [_MAGIC, struct.pack(order + "IQQ", file.version, len(file.tensors), len(file.entries))]
    for entry in file.entries:
        parts += [_text(entry.key.encode(), order), struct.pack(order + "I", entry.type), entry.data]
    offset = 0
    for tensor in file.tensors:
        rank = len(tensor.shape)
        place = struct.pack(f"{order}I{rank}QIQ", rank, *tensor.shape, tensor.type, offset)
        parts += [_text(tensor.name.encode(), order), place]
        offset += _aligned_size(file, tensor)
    header = b"".join(parts)
    return header + bytes(-len(header) % file.alignment)


def _text(text: bytes, order: str) -> bytes:
    return struct.pack(order + "Q", len(text)) + text


def _shown(value: Any) -> str:
    """Return a value or a name from a file as it may stand in a sentence."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _broken(what: str) -> ModelError:
    return ModelError(f"{what} is truncated, or is not a GGUF file.", hint="Download the file again.")
