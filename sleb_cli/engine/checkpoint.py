"""The weight files of a checkpoint folder: read tensor by tensor, and written in shards."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sleb_cli.atomic import to_json
from sleb_plugins import ModelError, OutputError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        ModelError: the file is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}.", hint="Name a folder that holds a model.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON.", hint="Copy or download the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.", hint="Copy or download the model again.")
    return value


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder, in order: safetensors where there are any, else PyTorch pickles."""

    folder: Path
    names: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """Where the files are."""
        return [self.folder / name for name in self.names]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read every tensor once, in the files' order, one file open at a time.

        Raises:
            ModelError: a file is truncated, or a pickle holds more than tensors.
        """
        for path in self.paths:
            yield from _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)

    def tensor_names(self) -> list[str]:
        """List the tensors without reading their values where the format allows."""
        if self.names[0].endswith(".safetensors"):
            with ExitStack() as stack:
                return [name for path in self.paths for name in stack.enter_context(_open(path)).offset_keys()]
        return [name for name, _ in self.tensors()]


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files that transformers would load from `folder`.

    Raises:
        ModelError: there are none, or the index names a file that is not there.
    """
    for single in (SAFETENSORS, PICKLE):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return WeightFiles(folder, (single,))
        if index.is_file():
            names = tuple(sorted(set(read_json(index).get("weight_map", {}).values())))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise ModelError(
                    f"{folder} lacks {len(missing)} of its {len(names)} weight files, {', '.join(missing[:1])} first.",
                    hint="Copy or download the model again.",
                )
            return WeightFiles(folder, names)
    raise ModelError(
        f"{folder} has no weights: no {SAFETENSORS}, no {PICKLE}, and no index of either.",
        hint="Name a folder that holds a whole model.",
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{path} is truncated, or is no safetensors file.", hint="Copy or download it again."
        ) from error


def _safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with _open(path) as file:
        for name in file.offset_keys():
            yield name, file.get_tensor(name)


def _pickled(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        # Only tensors: a pickle that would run code is refused by `weights_only`.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{path} is not safe to read: it is truncated, or holds more than tensors.",
            hint="Convert the model to safetensors where you trust it, or name another copy.",
        ) from error
    yield from tensors.items()


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> Iterator[int]:
    """Write safetensors shards of at most `max_shard_bytes` and their index; give each shard's size as it is done.

    Never more than one shard is in memory. A tensor larger than a shard gets one of its own.
    """
    shards: list[list[str]] = []
    total = 0
    # Neither `enumerate` nor a name of ours may hold a shard while the next is filled: two would be in memory.
    for shard in _packed(tensors, max_shard_bytes):
        shards.append(list(shard))
        _save(folder / f"{len(shards)}.partial", shard)
        size = sum(tensor.nbytes for tensor in shard.values())
        total += size
        del shard
        yield size
    if len(shards) == 1:
        (folder / "1.partial").rename(folder / SAFETENSORS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.partial").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{SAFETENSORS}.index.json").write_text(to_json(index), encoding="utf-8")


def _packed(tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _save(path: Path, shard: dict[str, torch.Tensor]) -> None:
    try:
        save_file(_apart(shard), path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code:  # the system's own error in another language's words: let `writing` say what it means
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise OutputError(
            f"Cannot write the weights: {error}.",
            hint="Free some space, or choose another place with -o.",
        ) from error


def _apart(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give each tensor memory of its own: those of a pickle may share, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for name, tensor in shard.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return result
