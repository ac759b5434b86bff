"""The weight files of a checkpoint folder, and their headers, which are read without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sleb_cli.engine.files.copying import links_outside, reading
from sleb_cli.engine.files.fingerprint import fingerprint_tensors
from sleb_plugins import ModelError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4), "I64": ("int64", 8),
    "U64": ("uint64", 8), "F64": ("float64", 8), "C64": ("complex64", 8),
}  # fmt: skip
"""Torch's name and the bytes of each data type of safetensors that torch has too; files may hold
others.
"""

# The limit of safetensors for a header. No other JSON of a checkpoint comes near it.
_MAX_JSON_BYTES = 100_000_000
# Lists and objects, of which a header of a million tensors has three each; each takes some 100
# bytes of memory.
_MAX_CONTAINERS = 4_000_000
_MAX_DEPTH = 100
_MAX_INTEGER = 2**63 - 1
_MAX_DIMENSIONS = 64


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint."""
    try:
        with reading(path), path.open("rb") as file:
            value = _parse_json(file.read(_MAX_JSON_BYTES + 1))
    except ValueError as error:
        raise ModelError(
            f"{path} is not readable JSON.", hint="Copy or download the model again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.", hint="Copy or download the model again.")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise ModelError(f"{path} is nested too deeply.", hint="Copy or download the model again.")
    return value


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _parse_json(raw: bytes) -> Any:
    """Parse JSON that may be hostile: every fault is a ValueError, even a number too large for
    Python.
    """
    if len(raw) > _MAX_JSON_BYTES or raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise ValueError("too long")
    try:
        return json.loads(raw.decode("utf-8"))
    except (RecursionError, MemoryError) as error:
        raise ValueError("too deep or too long") from error


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


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder, in order: safetensors if there are any, else PyTorch pickles."""

    paths: tuple[Path, ...]

    @cached_property
    def headers(self) -> tuple[Header, ...]:
        """The headers of the files.

        Each file is opened once; a safetensors file's values are not read.
        """
        return tuple(read_header(path) for path in self.paths)

    @property
    def stored(self) -> list[StoredTensor]:
        """All tensors, in the files' order.

        If two files hold a name, the later one counts, as in transformers.
        """
        last = {tensor.name: tensor for header in self.headers for tensor in header.tensors}
        return [
            tensor
            for header in self.headers
            for tensor in header.tensors
            if last[tensor.name] is tensor
        ]

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors."""
        return [tensor.name for tensor in self.stored]


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files that transformers would load from `folder`.

    Raises:
        ModelError: there are none, or some that the index names are missing or outside the folder.
    """
    for single in (SAFETENSORS, PICKLE):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return WeightFiles((folder / single,))
        if index.is_file():
            return WeightFiles(_files_in(index))
    raise ModelError(
        f"{folder} has no weights: no {SAFETENSORS}, no {PICKLE}, and no index of either.",
        hint="Name a folder that holds a complete model.",
    )


def _files_in(index: Path) -> tuple[Path, ...]:
    folder, hint = index.parent, "Copy or download the model again."
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ModelError(
            f"The weight_map of {index} does not map tensors to names of files.", hint=hint
        )
    names = sorted(set(weight_map.values()))
    if not names:
        raise ModelError(f"{index} lists no weight files.", hint=hint)
    with reading(index):
        outside = [name for name in names if "\0" in name or links_outside(folder / name, folder)]
        missing = [name for name in names if not (folder / name).is_file()]
    if outside:
        raise ModelError(
            f"{index} names a weight file outside its folder: {outside[0]!r}.", hint=hint
        )
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its {len(names)} weight files, such as "
            f"{missing[0]}.",
            hint=hint,
        )
    return tuple(folder / name for name in names)


def read_header(path: Path) -> Header:
    """Read the header of a weight file."""
    if path.suffix != ".safetensors":
        from sleb_cli.engine.files.tensors import tensors_in_pickle  # which imports torch

        return Header(path, tuple(tensors_in_pickle(path)), {})
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= min(size - 8, _MAX_JSON_BYTES) else b""
    end = 8 + length
    try:
        entries = _parse_json(raw)
        metadata = entries.pop("__metadata__", None) or {}
        "".join(
            [*entries, *metadata, *metadata.values()]
        ).encode()  # raises if a name or a text is no Unicode string
        tensors = [_stored_tensor(path, name, entry, end) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
        for tensor in tensors:  # no gaps, no overlaps, and nothing after the last tensor
            _require(tensor.start == end)
            end += tensor.size
        _require(end == size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path) from error
    return Header(path, tuple(tensors), metadata)


def fingerprint_weights(header: Header) -> str:
    """Return a SHA-256 over the tensors of a weight file: small ones whole, of others the ends."""
    if header.path.suffix != ".safetensors":
        from sleb_cli.engine.files.tensors import fingerprint_pickle  # which imports torch

        return fingerprint_pickle(header.path)
    ranges = [(tensor.start or 0, tensor.size) for tensor in header.tensors]
    return fingerprint_tensors(header.path, ranges)


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    _require(
        isinstance(dtype, str)
        and isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and begin <= end
    )
    _require(
        all(type(number) is int and 0 <= number <= _MAX_INTEGER for number in (*shape, begin, end))
    )
    _, item_bytes = DTYPES.get(dtype, ("", None))
    _require(item_bytes is None or math.prod(shape) * item_bytes == end - begin)
    return StoredTensor(name, dtype, tuple(shape), end - begin, path, start + begin)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("not as safetensors says")


def broken(path: Path) -> ModelError:
    """Return the error for a file of safetensors that cannot be read."""
    return ModelError(
        f"{path} is truncated, or is not a safetensors file.", hint="Copy or download it again."
    )
