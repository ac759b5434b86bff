"""Turn new values of a model's parameters into tensors of the GGUF file that the model was read from.

GGUF files use other names than transformers, and may store rows in another order or add 1 to a norm's gains. A
parameter is found in the file by its values, in any of these layouts, so no table of names is needed, and a tensor that
does not hold exactly these values is never taken for it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from sleb_cli.engine.files.copying import read_range
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor
from sleb_cli.engine.recovery.file_tensors import block_number, weights_at
from sleb_plugins import UnsupportedModelError

WRITTEN = tuple(GGMLQuantizationType[name] for name in ("Q8_0", "BF16", "F16", "F32"))
"""The types for new values. In fewer than 8 bits, on whose grid the old values lie, most of a small change is lost."""

_ELSEWHERE = "Write a checkpoint instead: choose a folder with -o."

_OFFSETS = (0.0, -1.0, 1.0)
"""What is added to a norm's stored gains: where a model multiplies by 1 + gain, files may hold the sum."""


def type_to_write(type_: int, width: int) -> GGMLQuantizationType:
    """Return the type in which new values of a tensor are written: its own, or the smallest one of 8 bits or more.

    `width` is the length of a row, of which the values that are packed together must be a part.
    """
    able = [each for each in WRITTEN if width % GGML_QUANT_SIZES[each][0] == 0]
    return GGMLQuantizationType(type_) if type_ in able else able[0]


@dataclass(frozen=True)
class _Place:
    """Where a parameter is in the file, and how it lies there.

    The parameter is the tensor plus `offset`, transposed or not, and its row `i` is row `rows[i]` of that.
    """

    tensor: GgufTensor
    offset: float = 0.0
    is_transposed: bool = False
    rows: Tensor | None = None

    def read(self, stored: Tensor) -> Tensor:
        """Return the parameter, given what is stored, float32."""
        values = stored.T if self.is_transposed else stored
        values = values if self.rows is None else values[self.rows]
        return values + self.offset if self.offset else values

    def write(self, values: Tensor) -> Tensor:
        """Return what is to be stored for these values of the parameter, float32."""
        values = values - self.offset if self.offset else values
        if self.rows is not None:
            values = torch.empty_like(values).index_copy_(0, self.rows, values)
        return values.T if self.is_transposed else values


class GgufTensors:
    """The tensors of a GGUF file that hold a model's parameters, and their new values once there are some.

    Args:
        file: the file.
        skippable: the dense model, with its own values.
        blocks_path: the name of the list of blocks in it.
    """

    def __init__(self, file: GgufFile, skippable: SkippableModel, blocks_path: str) -> None:
        self._file, self._skippable, self._blocks_path = file, skippable, blocks_path
        self.written: dict[str, GgufTensor] = {}
        """The tensors that hold new values, by their names in the file."""
        self._places: dict[str, list[_Place]] = {}
        self._unpacked: dict[str, Tensor] = {}

    def require(self, names: Iterable[str]) -> None:
        """Check that the file holds these parameters.

        Raises:
            UnsupportedModelError: it does not, or not as they are in the model.
        """
        for name in names:
            self._find(name)

    def store(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack new values as the file holds them, and return what is read back: these are the model's values then.

        Raises:
            UnsupportedModelError: the file does not hold such a parameter, or holds its values twice.
        """
        found = {}
        for name, value in values.items():
            place, *others = self._find(name)
            if others:
                raise UnsupportedModelError(
                    f"{self._file.path} holds the values of {name} twice, in {place.tensor.name} and in "
                    f"{others[0].tensor.name}, so sleb cannot tell which of them takes the new ones.",
                    hint=_ELSEWHERE,
                )
            type_ = type_to_write(place.tensor.type, place.tensor.shape[0])
            stored = place.write(value.detach().float().cpu()).contiguous().numpy()
            packed = quantize(stored, type_)
            self.written[place.tensor.name] = replace(
                place.tensor, type=int(type_), size=packed.nbytes, values=packed.tobytes()
            )
            read = place.read(_unpacked(packed, type_, stored.shape))
            found[name] = read.to(value.device, value.dtype).contiguous()
        return found

    def _find(self, name: str) -> list[_Place]:
        """Return all places that hold the values of a parameter."""
        if name not in self._places:
            with weights_at(self._skippable, self._blocks_path, name):
                own = self._skippable.model.get_parameter(name).detach().clone().cpu()
            near = self._near(name, own.numel())
            self._places[name] = [place for tensor in near if (place := _place_of(own, tensor, self._read(tensor)))]
        if not self._places[name]:
            raise UnsupportedModelError(
                f"{self._file.path} holds no tensor with the values of {name}, so it cannot take new ones.",
                hint=_ELSEWHERE,
            )
        return self._places[name]

    def _near(self, name: str, size: int) -> list[GgufTensor]:
        """Return the tensors that may hold a parameter: those of its block, or those outside of the blocks."""
        block = block_number(self._blocks_path, name)
        return [
            tensor
            for tensor in self._file.tensors
            if (not tensor.name.startswith("blk.") if block is None else tensor.name.startswith(f"blk.{block}."))
            and math.prod(tensor.shape) == size
        ]

    def _read(self, tensor: GgufTensor) -> Tensor:
        """Return the values of a tensor; those of the same block are kept, since several parameters look for them."""
        if tensor.name not in self._unpacked:
            if any(_block_of(name) != _block_of(tensor.name) for name in self._unpacked):
                self._unpacked.clear()
            with self._file.path.open("rb", buffering=0) as source:
                packed = np.frombuffer(b"".join(read_range(source, tensor.start, tensor.size)), np.uint8)
            self._unpacked[tensor.name] = _unpacked(packed, tensor.type, tensor.shape[::-1])
        return self._unpacked[tensor.name]


def _block_of(name: str) -> list[str]:
    return name.split(".")[:2]


def _unpacked(packed: np.ndarray[Any, Any], type_: int, shape: tuple[int, ...]) -> Tensor:
    """Return the values, float32, of tensors that are packed."""
    rows = packed.view(np.uint8).reshape(*shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType(type_)).astype(np.float32).reshape(shape))


def _place_of(own: Tensor, tensor: GgufTensor, stored: Tensor) -> _Place | None:
    """Return how a tensor holds a parameter, or None if it holds other values."""
    if own.dim() == 1:
        places = [_Place(tensor, offset) for offset in _OFFSETS]
    else:
        places = [_Place(tensor), _Place(tensor, is_transposed=True)]
        if stored.shape == own.shape and (rows := _rows(own, stored.to(own.dtype))) is not None:
            places.append(_Place(tensor, rows=rows))
    return next((place for place in places if torch.equal(place.read(stored).to(own.dtype), own)), None)


def _rows(own: Tensor, stored: Tensor) -> Tensor | None:
    """Return which row of `stored` each row of `own` is; None if they are not the same rows."""
    places: dict[bytes, deque[int]] = defaultdict(deque)
    for place, row in enumerate(_as_bytes(stored)):
        places[row].append(place)
    found = [places[row].popleft() if places[row] else None for row in _as_bytes(own)]
    return None if None in found else torch.tensor(found)


def _as_bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.contiguous().flatten(1).view(torch.uint8).numpy()]
