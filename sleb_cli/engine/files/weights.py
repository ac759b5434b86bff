"""The weight files of a checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sleb_cli.engine.files.config_files import read_json
from sleb_cli.engine.files.copying import links_outside, reading
from sleb_cli.engine.files.fingerprint import fingerprint_tensors
from sleb_cli.engine.files.headers import Header, StoredTensor, read_safetensors_header
from sleb_plugins import ModelError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder: safetensors if there are any, else PyTorch pickles."""

    paths: tuple[Path, ...]

    @cached_property
    def headers(self) -> tuple[Header, ...]:
        """The headers of the files; no values of a safetensors file are read."""
        return tuple(read_header(path) for path in self.paths)

    @property
    def stored(self) -> list[StoredTensor]:
        """All tensors, in the files' order.

        If two files hold a name, the later one counts, as in transformers.
        """
        tensors = [tensor for header in self.headers for tensor in header.tensors]
        last = {tensor.name: tensor for tensor in tensors}
        return [tensor for tensor in tensors if last[tensor.name] is tensor]

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors."""
        return [tensor.name for tensor in self.stored]


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files that transformers would load from `folder`.

    Raises:
        ModelError: there are none, or some that the index names are missing or outside the folder.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return WeightFiles((folder / name,))
        if index.is_file():
            return WeightFiles(_files_in(index))
    raise ModelError(
        f"{folder} has no weights: no {SAFETENSORS}, no {PICKLE}, and no index of either.",
        hint="Name a folder that holds a complete model.",
    )


def _files_in(index: Path) -> tuple[Path, ...]:
    folder = index.parent
    hint = "Copy or download the model again."
    weight_map = read_json(index).get("weight_map", {})
    is_map = isinstance(weight_map, dict)
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(
            f"The weight_map of {index} does not map tensors to names of files.", hint=hint
        )
    names = sorted(set(weight_map.values()))
    if not names:
        raise ModelError(f"{index} lists no weight files.", hint=hint)
    missing = []
    with reading(index):
        for name in names:
            if "\0" in name or links_outside(folder / name, folder):
                raise ModelError(
                    f"{index} names a weight file outside its folder: {name!r}.", hint=hint
                )
            if not (folder / name).is_file():
                missing.append(name)
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its {len(names)} weight files, such as "
            f"{missing[0]}.",
            hint=hint,
        )
    return tuple(folder / name for name in names)


def read_header(path: Path) -> Header:
    """Read the header of a weight file."""
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    from sleb_cli.engine.files.pickles import read_pickle_header  # which imports torch

    return read_pickle_header(path)


def fingerprint_weights(header: Header) -> str:
    """Return a SHA-256 over the tensors of a weight file: small ones whole, of others the ends."""
    if header.path.suffix != ".safetensors":
        from sleb_cli.engine.files.pickles import fingerprint_pickle  # which imports torch

        return fingerprint_pickle(header.path)
    ranges = [(tensor.start or 0, tensor.size) for tensor in header.tensors]
    return fingerprint_tensors(header.path, ranges)
