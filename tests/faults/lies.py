"""What lies: pickles, weight files and GGUF files, made from honest ones."""

import io
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch


class Runs:
    """A pickle of it calls `function` when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def saved_as(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def weight_file(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# GGUF files.

UINT32, INT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 5, 6, 8, 9, 10
CODES = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", STRING: "<Q", UINT64: "<Q"}


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts that need not agree: keys, types and values; tensors' names, shapes,
    types and offsets.
    """

    entries: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    values: bytes
    version: int = 3

    def to_bytes(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.entries))]
        for key, type_, data in self.entries:
            parts += [text(key), struct.pack("<I", type_), data]
        for name, shape, type_, offset in self.tensors:
            parts += [
                text(name),
                struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset),
            ]
        header = b"".join(parts)
        return header + bytes(-len(header) % 32) + self.values


def gguf_of(path: Path) -> Gguf:
    """Take a whole file apart, as the format's own library reads it."""
    reader = gguf.GGUFReader(path)
    entries = []
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            _, key, type_, *value = [bytes(part.tobytes()) for part in field.parts]
            entries.append((key, int.from_bytes(type_, "little"), b"".join(value)))
    begin = min(tensor.data_offset for tensor in reader.tensors)
    tensors = [
        (
            tensor.name.encode(),
            tuple(map(int, tensor.shape)),
            int(tensor.tensor_type),
            int(tensor.data_offset - begin),
        )
        for tensor in reader.tensors
    ]
    return Gguf(tuple(entries), tuple(tensors), path.read_bytes()[begin:])


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def key(name, type_, data):
    """Return a function that gives a GGUF file this key, in the place of one of that name."""
    name = name.encode()

    def make(file):
        entries = {each[0]: each for each in file.entries} | {name: (name, type_, data)}
        return replace(file, entries=tuple(entries.values()))

    return make


def number(name, type_, value):
    return key(name, type_, struct.pack(CODES[type_], value))
