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


def saved_as(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def weight_file(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts that need not agree: keys, types and values; tensors' names, shapes,
    types and offsets.
    """

    entries: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    values: bytes

    def to_bytes(self) -> bytes:
        header = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        for key, type_, data in self.entries:
            header += _text(key) + struct.pack("<I", type_) + data
        for name, shape, type_, offset in self.tensors:
            numbers = (len(shape), *shape, type_, offset)
            header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
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
    tensors = []
    for tensor in reader.tensors:
        shape = tuple(map(int, tensor.shape))
        offset = int(tensor.data_offset - begin)
        tensors.append((tensor.name.encode(), shape, int(tensor.tensor_type), offset))
    return Gguf(tuple(entries), tuple(tensors), path.read_bytes()[begin:])


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def with_number(file: Gguf, name: str, value: int) -> Gguf:
    """Give a file this number, in place of the one of that name."""
    entries = {entry[0]: entry for entry in file.entries}
    entries[name.encode()] = (name.encode(), gguf.GGUFValueType.UINT32, struct.pack("<I", value))
    return replace(file, entries=tuple(entries.values()))
