"""The gguf package without what takes it long, while transformers reads a model's config and weights.

It keeps an array for each token, ten seconds for a vocabulary like Gemma's, which transformers has it read three times;
builds its table of names again for each module, six seconds for thirty blocks; and unpacks on one core.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from sleb_cli.engine.gguf.file import ARRAY, FORMATS, STRING

_LONGEST = 1 << 12
"""No list is longer that has a value per block, or for the position in a rotation."""

_ROWS = 256
"""How many rows of a matrix are unpacked at a time."""

_DEQUANTIZE = gguf.dequantize


class QuickReader(gguf.GGUFReader):  # type: ignore[misc]
    """The gguf package's reader, which leaves out the items of long lists; the file's header was checked before."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data, place = memoryview(self.data), orig_offs + 12
        kind, count = struct.unpack("<IQ", data[orig_offs:place])
        if count <= _LONGEST:
            return super()._get_field_parts(orig_offs, raw_type)
        if kind == STRING:
            for _ in range(count):
                place += 8 + int.from_bytes(data[place : place + 8], "little")
        else:
            place += count * struct.calcsize(FORMATS[kind])
        return place - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind)]


def dequantize(data: NDArray[Any], kind: gguf.GGMLQuantizationType) -> Any:
    """Return what the gguf package returns, unpacked on all cores, some rows at a time."""
    if data.dtype != np.uint8:
        return _DEQUANTIZE(data, kind)
    out = np.empty(gguf.quant_shape_from_byte_shape(data.shape, kind), np.float32)
    packed, unpacked = data.reshape(-1, data.shape[-1]), out.reshape(-1, out.shape[-1])

    def fill(start: int) -> None:
        unpacked[start : start + _ROWS] = _DEQUANTIZE(packed[start : start + _ROWS], kind)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, len(packed), _ROWS)))
    return out


def quick_gguf() -> AbstractContextManager[Any]:
    """Let transformers, which looks these up when it reads a file, use the two above, and build one table."""
    table = cache(gguf.get_tensor_name_map)
    return mock.patch.multiple(gguf, GGUFReader=QuickReader, dequantize=dequantize, get_tensor_name_map=table)
