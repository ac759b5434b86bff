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
from functools import lru_cache
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


Places = dict[str, list[_Place]]
"""All places that hold the values of a parameter, by its name in the model."""


def find_places(
    file: GgufFile, skippable: SkippableModel, blocks_path: str, names: Iterable[str], dtype: torch.dtype | None = None
) -> Places:
    """Find the tensors of the file that hold these parameters of the dense model, which has its own values.

    `dtype` is the data type to which the values of the file were rounded; None for the model's.

    Raises:
        UnsupportedModelError: the file does not hold a parameter as it is in the model.
    """

    @lru_cache(maxsize=4)  # several parameters of a block look for themselves in the same tensors
    def read(tensor: GgufTensor) -> Tensor:
        with file.path.open("rb", buffering=0) as source:
            packed = np.frombuffer(b"".join(read_range(source, tensor.start, tensor.size)), np.uint8)
        return _unpacked(packed, tensor.type, tensor.shape[::-1])

    places: Places = {}
    for name in names:
        with weights_at(skippable, blocks_path, name):
            own = skippable.model.get_parameter(name).detach().to(dtype=dtype, copy=True).cpu()
        block = block_number(blocks_path, name)
        near = [
            tensor
            for tensor in file.tensors
            if (not tensor.name.startswith("blk.") if block is None else tensor.name.startswith(f"blk.{block}."))
            and math.prod(tensor.shape) == own.numel()
        ]
        places[name] = [place for tensor in near if (place := _place_of(own, tensor, read(tensor)))]
        if not places[name]:
            raise UnsupportedModelError(
                f"{file.path} holds no tensor with the values of {name}, so it cannot take new ones.", hint=_ELSEWHERE
            )
    return places


def pack(
    file: GgufFile, places: Places, values: Mapping[str, Tensor]
) -> tuple[dict[str, GgufTensor], dict[str, Tensor]]:
    """Pack new values as the file holds them.

    Returns:
        The tensors by their names in the file, and the values that are read back: these are the model's then.

    Raises:
        UnsupportedModelError: the file holds the values of a parameter twice.
    """
    written, found = dict[str, GgufTensor](), dict[str, Tensor]()
    for name, value in values.items():
        place, *others = places[name]
        if others:
            raise UnsupportedModelError(
                f"{file.path} holds the values of {name} twice, in {place.tensor.name} and in "
                f"{others[0].tensor.name}, so sleb cannot tell which of them takes the new ones.",
                hint=_ELSEWHERE,
            )
        type_ = type_to_write(place.tensor.type, place.tensor.shape[0])
        stored = place.write(value.detach().float().cpu()).contiguous().numpy()
        packed = quantize(stored, type_)
        written[place.tensor.name] = replace(place.tensor, type=int(type_), size=packed.nbytes, values=packed.tobytes())
        found[name] = place.read(_unpacked(packed, type_, stored.shape)).to(value.device, value.dtype).contiguous()
    return written, found


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
