"""Weight files that are PyTorch pickles: only tensors are read, and no code is run."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch

from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.fingerprint import MAX_WHOLE_BYTES, SAMPLE_BYTES
from sleb_cli.engine.files.headers import DTYPES, Header, StoredTensor
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import ModelError

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, (torch_name, _) in DTYPES.items()
}
"""The data types that torch has, by their names in safetensors."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def load_pickle(path: Path, *, values: bool = True) -> dict[str, torch.Tensor]:
    """Load the tensors of a pickle, memory-mapped if possible; without `values`, on meta."""
    unsafe = ModelError(
        f"{path} is not safe to read: it is truncated, or holds more than tensors.",
        hint="If you trust the model, convert it to safetensors; otherwise use another copy.",
    )
    device = "cpu" if values else "meta"
    with translate_errors(lambda words: unsafe):
        mapped = values and zipfile.is_zipfile(path)
        with reading(path):
            # `weights_only` refuses a pickle that would run code.
            tensors = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict):
        raise unsafe
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise unsafe
        if values and tensor.is_meta:
            raise unsafe
    return tensors


def read_pickle_header(path: Path) -> Header:
    """Describe each tensor of a pickle, as the header of a safetensors file would."""
    stored = []
    for name, tensor in load_pickle(path, values=False).items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            raise ModelError(
                f"{path} holds {name} as {tensor.dtype}, {tensor.layout}, which safetensors cannot "
                f"store.",
                hint="Load the model with transformers, save it again, and use that copy.",
            )
        # The bytes of its shape, not of its storage: tensors may share storage, or be views.
        dtype = DTYPE_NAMES[tensor.dtype]
        stored.append(StoredTensor(name, dtype, tuple(tensor.shape), tensor.nbytes, path, None))
    return Header(path, tuple(stored), {})


def fingerprint_pickle(path: Path) -> str:
    """Return a SHA-256 over the tensors of a pickle: small ones whole, of others the ends."""
    digest = hashlib.sha256()
    for tensor in load_pickle(path).values():
        values = tensor.reshape(-1).view(torch.uint8)
        if tensor.nbytes < MAX_WHOLE_BYTES:
            samples = [values]
        else:
            samples = [values[:SAMPLE_BYTES], values[-SAMPLE_BYTES:]]
        for sample in samples:
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
