"""The tensors in the weight files of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.pickles import TORCH_DTYPES, load_pickle
from sleb_cli.engine.files.weights import WeightFiles
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins import ModelError


def float_dtypes(weights: WeightFiles) -> list[torch.dtype]:
    """Return the floating-point data types of the tensors, each once, if of two bytes or more."""
    dtypes = []
    for tensor in weights.stored:
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            continue
        if dtype not in dtypes:
            dtypes.append(dtype)
    return dtypes


def read_all(
    weights: WeightFiles, names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read all tensors, or the named ones, in the files' order, one file open at a time."""
    for header in weights.headers:
        wanted = [tensor.name for tensor in header.tensors]
        if names is not None:
            wanted = [name for name in wanted if name in names]
        yield from zip(wanted, read_tensors(header.path, wanted), strict=True)


def read_tensors(path: Path, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """Read these tensors of a weight file, in this order, memory-mapped."""
    if not names:
        return
    if path.suffix != ".safetensors":
        tensors = load_pickle(path)
        for name in names:
            yield tensors[name]
        return
    fault = error_saying(ModelError, f"{path} cannot be read", "Copy or download it again.")
    with translate_errors(fault), reading(path):  # torch opens it again, with errors of its own
        opened = safe_open(path, framework="pt")
    with opened as file:
        for name in names:
            yield file.get_tensor(name)
