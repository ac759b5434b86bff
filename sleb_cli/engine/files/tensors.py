"""The tensors in the weight files of a checkpoint folder."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.fingerprint import MAX_WHOLE_BYTES, SAMPLE_BYTES
from sleb_cli.engine.files.weights import DTYPES, StoredTensor, WeightFiles, broken
from sleb_cli.engine.third_party import prefer_disk_error, translate_errors
from sleb_plugins import ModelError

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, (dtype, _) in DTYPES.items()
}
"""The data types of safetensors that torch has too; files may hold others, whose bytes are only
copied.
"""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def float_dtypes(weights: WeightFiles) -> list[torch.dtype]:
    """Return the data types of the tensors that hold floating-point numbers of two bytes or more,
    each once.
    """
    known = (
        TORCH_DTYPES.get(name) for name in dict.fromkeys(tensor.dtype for tensor in weights.stored)
    )
    return [dtype for dtype in known if dtype and dtype.is_floating_point and dtype.itemsize > 1]


def read_all(
    weights: WeightFiles, names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every tensor, or only the tensors of these names, in the files' order, one file open at
    a time.
    """
    for header in weights.headers:
        to_read = [
            tensor.name for tensor in header.tensors if names is None or tensor.name in names
        ]
        yield from zip(to_read, read_tensors(header.path, to_read), strict=True)


def read_tensors(path: Path, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """Read these tensors of a weight file, in this order, by the format's own library; files are
    memory-mapped.
    """
    if not names:
        return
    if path.suffix != ".safetensors":
        tensors = load_pickle(path)
        yield from (tensors[name] for name in names)
        return
    try:
        with reading(path), prefer_disk_error(SafetensorError, OSError, RuntimeError):
            opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise broken(path) from error
    with opened as file:
        for name in names:
            yield file.get_tensor(name)


def tensors_in_pickle(path: Path) -> Iterator[StoredTensor]:
    """Describe each tensor of a pickle, as a header would."""
    for name, tensor in load_pickle(path, values=False).items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            raise ModelError(
                f"{path} holds {name} as {tensor.dtype}, {tensor.layout}, which safetensors cannot "
                f"store.",
                hint="Load the model with transformers, save it again, and use that copy.",
            )
        # The bytes of its shape, not of its storage: tensors of a pickle may share storage, or be
        # views.
        yield StoredTensor(
            name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, path, None
        )


def load_pickle(path: Path, *, values: bool = True) -> dict[str, torch.Tensor]:
    """Load the tensors of a pickle, memory-mapped if possible; without `values`, on the meta
    device.
    """
    unsafe = ModelError(
        f"{path} is not safe to read: it is truncated, or holds more than tensors.",
        hint="If you trust the model, convert it to safetensors; otherwise use another copy.",
    )
    with translate_errors(lambda words: unsafe):
        # `weights_only` refuses a pickle that would run code.
        mapped = values and zipfile.is_zipfile(path)
        with reading(path):
            tensors = torch.load(
                path, map_location="cpu" if values else "meta", weights_only=True, mmap=mapped
            )
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and not (values and tensor.is_meta)
        for name, tensor in tensors.items()
    ):
        raise unsafe
    return tensors


def fingerprint_pickle(path: Path) -> str:
    """Return a SHA-256 over the tensors of a pickle: small ones whole, of others the ends."""
    digest = hashlib.sha256()
    for tensor in load_pickle(path).values():
        values = tensor.reshape(-1).view(torch.uint8)
        if tensor.nbytes < MAX_WHOLE_BYTES:
            parts = [values]
        else:
            parts = [values[:SAMPLE_BYTES], values[-SAMPLE_BYTES:]]
        for part in parts:
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()
