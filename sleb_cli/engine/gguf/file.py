"""The GGUF format: header values are kept byte for byte, and tensors are copied unchanged or given new values."""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sleb_cli.records import why_not_read
from sleb_plugins.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_INT32 = 5

_PIECE_BYTES = 16 << 20

# Limits that no model comes near, so that a file that lies takes neither memory nor time. That of dimensions is the
# format's own.
_LONGEST_HEADER = 128 << 20
_MOST_ITEMS = 1 << 22
_LONGEST_NAME = 256
_LARGEST_ALIGNMENT = 1 << 20
_MOST_DIMENSIONS = 4
_UINT32 = 4


@dataclass(frozen=True)
class Entry:
    """One key of the metadata; `data` holds the bytes of its value in the file, after the number of its type."""

    key: str
    type: int
    data: bytes


@dataclass(frozen=True)
class Tensor:
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
    tensors: tuple[Tensor, ...]

    @cached_property
    def _by_key(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in self.entries}

    def get(self, key: str) -> Any:
        """Return the value of a key in Python's types, or None if there is no such key."""
        entry = self._by_key.get(key)
        return None if entry is None else decode(entry, self.order)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, which is the first part of the architecture's own keys."""
        return str(self.get("general.architecture") or "")

    def count(self, key: str) -> int | None:
        """Return one of the architecture's own keys that counts something, or None if there is no such key.

        Raises:
            ModelError: it is no whole number of 0 or more.
        """
        found = self.own(key)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
            raise ModelError(
                f"{self.path} says {_shown(found)} for {self.architecture}.{key}, which counts something.",
                hint="Download the file again.",
            )
        return found

    def length(self, key: str) -> int | None:
        """Return how many items an array has; None if there is no such array."""
        entry = self._by_key.get(key)
        if entry is None or entry.type != ARRAY:
            return None
        return int(struct.unpack_from(f"{self.order}Q", entry.data, 4)[0])

    def own(self, key: str) -> Any:
        """Return the value of one of the architecture's own keys, such as "block_count"."""
        return self.get(f"{self.architecture}.{key}")

    @property
    def alignment(self) -> int:
        """The alignment of each tensor in bytes."""
        found = self.get("general.alignment")
        return 32 if found is None else int(found)


def decode(entry: Entry, order: str) -> Any:
    """Return an entry's value in Python's types; an array becomes a list."""
    return _Cursor(entry.data, order, f"The value of {entry.key}").value(entry.type)


def entry_of_integers(key: str, values: Iterable[int], order: str) -> Entry:
    """Return an entry with an array of int32."""
    numbers = list(values)
    return Entry(key, ARRAY, struct.pack(f"{order}IQ{len(numbers)}i", _INT32, len(numbers), *numbers))


def with_value(entry: Entry, value: int, order: str) -> Entry:
    """Return the entry with another integer of the same type."""
    return Entry(entry.key, entry.type, struct.pack(order + _FORMATS[entry.type], value))


def with_items(entry: Entry, places: Iterable[int], order: str) -> Entry:
    """Return the entry of an array with only the items at `places`, in that order."""
    items = _Cursor(entry.data, order, f"The value of {entry.key}").items()
    kept = [entry.data[items[place]] for place in places]
    return Entry(entry.key, ARRAY, entry.data[:4] + struct.pack(order + "Q", len(kept)) + b"".join(kept))


class _Cursor:
    """Reads numbers, strings and arrays from bytes in sequence."""

    def __init__(self, data: bytes | mmap.mmap, order: str, what: str) -> None:
        self.data, self.order, self.what = data, order, what
        self.place = 0

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize(code)))[0]

    def take(self, size: int) -> bytes:
        end = self.place + size
        if end > len(self.data):
            raise _broken(self.what)
        found = self.data[self.place : end]
        self.place = end
        return found

    def text(self) -> str:
        size = self.number("Q")
        if size > _LONGEST_NAME:
            raise _broken(self.what)
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise _broken(self.what) from error

    def value(self, type_: int) -> Any:
        if type_ == _STRING:
            # The tokens of a tokenizer may be incomplete UTF-8.
            return self.take(self.number("Q")).decode(errors="replace")
        if type_ != ARRAY:
            return self.number(self._format(type_))
        element, count = self.array()
        if element in _FORMATS:
            code = f"{count}{_FORMATS[element]}"
            return list(struct.unpack(self.order + code, self.take(count * struct.calcsize(_FORMATS[element]))))
        return [self.value(element) for _ in range(count)]

    def skip(self, type_: int) -> None:
        if type_ == _STRING:
            self.take(self.number("Q"))
        elif type_ != ARRAY:
            self.take(struct.calcsize(self._format(type_)))
        else:
            element, count = self.array()
            if element in _FORMATS:
                self.take(count * struct.calcsize(_FORMATS[element]))
            else:
                self.skip_strings(count)

    def skip_strings(self, count: int) -> None:
        # Called for each token of a vocabulary, so without `take` and `number`.
        size = struct.Struct(self.order + "Q")
        data, place, end = self.data, self.place, len(self.data) - size.size
        for _ in range(count):
            if place > end:
                raise _broken(self.what)
            place += size.size + size.unpack_from(data, place)[0]
        if place > len(data):
            raise _broken(self.what)
        self.place = place

    def array(self) -> tuple[int, int]:
        """Read the type and number of an array's items."""
        element, count = self.number("I"), self.number("Q")
        if element == ARRAY:
            raise ModelError(
                f"{self.what} holds arrays of arrays, which llama.cpp does not read either.",
                hint="Download the file again.",
            )
        if count > _MOST_ITEMS or (element != _STRING and element not in _FORMATS):
            raise _broken(self.what)
        return element, count

    def items(self) -> list[slice]:
        element, count = self.array()
        places = []
        for _ in range(count):
            start = self.place
            self.skip(element)
            places.append(slice(start, self.place))
        return places

    def _format(self, type_: int) -> str:
        if type_ not in _FORMATS:
            raise _broken(self.what)
        return _FORMATS[type_]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that the file holds all tensors, none of them in another's place.

    Raises:
        ModelError: the file is missing, truncated, damaged or not a GGUF file, has an unknown version or type, or is
            one part of a split model.
    """
    with _mapped(path) as (data, size):
        cursor = _Cursor(data, "<", str(path))
        if cursor.take(4) != _MAGIC:
            raise _broken(str(path))
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
        # Names are different, so a count that lies ends soon, whatever the file holds.
        entries = _by_name(cursor, (_entry(cursor) for _ in range(entry_count)), lambda entry: entry.key)
        tensors = _by_name(cursor, (_tensor(cursor) for _ in range(tensor_count)), lambda tensor: tensor.name)
        header = GgufFile(path, cursor.order, version, entries, ())
        _require_kinds(header)
        _require_one_file(header)
        begin = aligned(cursor.place, header.alignment)
    tensors = tuple(replace(tensor, start=begin + tensor.start) for tensor in tensors)
    _require_room(path, size, tensors, header.alignment)
    return replace(header, tensors=tensors)


_T = TypeVar("_T")


def _by_name(cursor: _Cursor, found: Iterable[_T], name: Callable[[_T], str]) -> tuple[_T, ...]:
    named: dict[str, _T] = {}
    for each in found:
        if name(each) in named:
            raise ModelError(f"{cursor.what} holds {_shown(name(each))} twice.", hint="Download the file again.")
        named[name(each)] = each
    return tuple(named.values())


def _require_kinds(file: GgufFile) -> None:
    """Check the types of the keys that are needed to read the rest."""
    types = {entry.key: entry.type for entry in file.entries}
    said = file.get("general.architecture")
    if types.get("general.alignment", _UINT32) != _UINT32 or types.get("general.architecture", _STRING) != _STRING:
        raise _broken(str(file.path))
    if not 0 < file.alignment <= _LARGEST_ALIGNMENT or file.alignment.bit_count() != 1:
        raise ModelError(
            f"{file.path} says that tensors begin at multiples of {file.alignment} bytes, which is no power of two up "
            f"to {_LARGEST_ALIGNMENT}.",
            hint="Download the file again.",
        )
    if said is not None and len(said) > _LONGEST_NAME:
        raise _broken(str(file.path))


def _require_room(path: Path, size: int, tensors: tuple[Tensor, ...], alignment: int) -> None:
    """Check that tensors lie within the file, aligned, and not in each other's place."""
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start < end or tensor.start % alignment or tensor.start + tensor.size > size:
            raise _broken(str(path))
        end = tensor.start + tensor.size


def write_gguf(file: GgufFile, output: Path, copied: Callable[[int], None]) -> None:
    """Write a file with this header, and copy the values of each tensor from offset `start` of `file.path`.

    Only one piece of a tensor is in memory at a time. `copied` is called with the size of each piece in bytes.

    Raises:
        ModelError: `file.path` cannot be read, or has become shorter.
    """
    with _reading(file.path):
        source = file.path.open("rb", buffering=0)
    with source, output.open("wb") as target:
        target.write(_header(file))
        for tensor in file.tensors:
            target.write(bytes(aligned(target.tell(), file.alignment) - target.tell()))
            for piece in pieces(source, tensor):
                target.write(piece)
                copied(len(piece))
        target.write(bytes(aligned(target.tell(), file.alignment) - target.tell()))


def gguf_size(file: GgufFile) -> int:
    """Return how many bytes `write_gguf` writes."""
    return len(_header(file)) + sum(aligned(tensor.size, file.alignment) for tensor in file.tensors)


def aligned(place: int, alignment: int) -> int:
    """Return the next multiple of `alignment`, or `place` itself if it is one."""
    return -(-place // alignment) * alignment


def _header(file: GgufFile) -> bytes:
    """Return all bytes before the first tensor's values, with padding."""
    order = file.order
    parts = [_MAGIC, struct.pack(order + "IQQ", file.version, len(file.tensors), len(file.entries))]
    for entry in file.entries:
        parts += [_text(entry.key, order), struct.pack(order + "I", entry.type), entry.data]
    offset = 0
    for tensor in file.tensors:
        rank = len(tensor.shape)
        parts += [
            _text(tensor.name, order),
            struct.pack(f"{order}I{rank}QIQ", rank, *tensor.shape, tensor.type, offset),
        ]
        offset += aligned(tensor.size, file.alignment)
    header = b"".join(parts)
    return header + bytes(aligned(len(header), file.alignment) - len(header))


def _text(text: str, order: str) -> bytes:
    data = text.encode()
    return struct.pack(order + "Q", len(data)) + data


def pieces(source: BinaryIO, tensor: Tensor) -> Iterator[bytes]:
    """Yield the values of a tensor of an open file in pieces, of which one is in memory at a time.

    Raises:
        ModelError: they cannot be read, or the file has become shorter.
    """
    if tensor.values is not None:
        yield tensor.values
        return
    path, place, size = Path(source.name), tensor.start, tensor.size
    while size:
        with _reading(path):
            source.seek(place)
            piece = source.read(min(size, _PIECE_BYTES))
        if not piece:
            raise _broken(source.name)
        yield piece
        place, size = place + len(piece), size - len(piece)


def _entry(cursor: _Cursor) -> Entry:
    key, type_ = cursor.text(), cursor.number("I")
    start = cursor.place
    cursor.skip(type_)
    return Entry(key, type_, cursor.data[start : cursor.place])


def _tensor(cursor: _Cursor) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, rank = cursor.text(), cursor.number("I")
    if rank > _MOST_DIMENSIONS:
        raise ModelError(
            f"The tensor {_shown(name)} in {cursor.what} has {rank} dimensions, and GGUF files have at most "
            f"{_MOST_DIMENSIONS}.",
            hint="Download the file again.",
        )
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
    if shape and shape[0] % packed:
        raise _broken(cursor.what)
    return Tensor(name, shape, type_, offset, math.prod(shape) * packed_bytes // packed)


def _require_one_file(file: GgufFile) -> None:
    parts = file.get("split.count") or 1
    if parts != 1:
        raise ModelError(
            f"{file.path} is one of {_shown(parts)} parts of a model.",
            hint="Merge the parts first: `llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf`.",
        )


@contextmanager
def _mapped(path: Path) -> Iterator[tuple[mmap.mmap, int]]:
    """Yield what may be the header, and the size of the file."""
    with _reading(path):
        if path.is_dir():
            raise FileNotFoundError
        if reason := why_not_read(path):
            raise ModelError(f"{path} cannot be read: {reason}.", hint="Name a GGUF file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise _broken(str(path))
            data = mmap.mmap(file.fileno(), min(size, _LONGEST_HEADER), access=mmap.ACCESS_READ)
    with data:
        yield data, size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelError(f"There is no file {path}.", hint="Check the path.") from error
    except PermissionError as error:
        raise ModelError(f"You may not read {path}.", hint="Change its permissions.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", hint="Copy or download it again.") from error


def _shown(value: Any) -> str:
    """Return a value or a name from a file as it may stand in a sentence."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _broken(what: str) -> ModelError:
    return ModelError(f"{what} is truncated, or is not a GGUF file.", hint="Download the file again.")
