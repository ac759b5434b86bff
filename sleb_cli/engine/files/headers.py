"""The headers of safetensors files: which tensors a file holds and where. Read without torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.engine.files.config_files import MAX_JSON_BYTES, parse_json
from sleb_cli.engine.files.copying import reading
from sleb_plugins import ModelError

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "I16": ("int16", 2), "U16": ("uint16", 2),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4),
    "F32": ("float32", 4), "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8),
    "C64": ("complex64", 8),
}  # fmt: skip
"""Torch's name and the bytes of the data types that torch has; files may hold others."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file.

    Attributes:
        dtype: as safetensors names it: "BF16".
        size: in bytes.
        start: the offset of its bytes in the file; None in a pickle.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    path: Path
    start: int | None


@dataclass(frozen=True)
class Header:
    """The header of a weight file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]


def read_safetensors_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ModelError: it cannot be read, or the tensors do not fill the file without gaps.
    """
    with reading(path), path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(file_bytes - 8, MAX_JSON_BYTES):
            raise broken(path)
        text = file.read(header_bytes)
    try:
        entries = parse_json(text)
        metadata = entries.pop("__metadata__", None) or {}
        "".join([*entries, *metadata, *metadata.values()]).encode()  # raises if one is not Unicode
        start = 8 + header_bytes
        tensors = [_stored_tensor(path, name, entry, start) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
        end = start
        for tensor in tensors:
            _require(tensor.start == end)
            end += tensor.size
        _require(end == file_bytes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path) from error
    return Header(path, tuple(tensors), metadata)


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype = entry["dtype"]
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    _require(isinstance(dtype, str) and isinstance(shape, list))
    for number in (*shape, begin, end):
        _require(type(number) is int and number >= 0)
    _require(begin <= end)
    if dtype in DTYPES:
        _, item_bytes = DTYPES[dtype]
        _require(math.prod(shape) * item_bytes == end - begin)
    return StoredTensor(name, dtype, tuple(shape), end - begin, path, data_start + begin)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("not as safetensors says")


def broken(path: Path) -> ModelError:
    """Return the error for a file of safetensors that cannot be read."""
    return ModelError(
        f"{path} is truncated, or is not a safetensors file.", hint="Copy or download it again."
    )
