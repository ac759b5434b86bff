"""A quicker gguf package, while transformers reads a model's config and weights.

The package keeps an array for each token, which takes ten seconds for a vocabulary like Gemma's,
and transformers has it read three times. It builds its table of names again for each module, six
seconds for thirty blocks. And it unpacks on one core.
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

_MAX_LIST_ITEMS = 1 << 12
"""No list with a value per block, or per position in a rotation, is longer."""

_ROWS = 256
"""Rows of a matrix that are unpacked at a time."""

# Bound before `quick_gguf` puts ours in its place.
_DEQUANTIZE = gguf.dequantize


class QuickReader(gguf.GGUFReader):  # type: ignore[misc]
    """The gguf package's reader, which leaves out the items of long lists.

    The file's header was checked before.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = memoryview(self.data)
        offset = orig_offs + 12
        kind, count = struct.unpack("<IQ", data[orig_offs:offset])
        if count <= _MAX_LIST_ITEMS:
            return super()._get_field_parts(orig_offs, raw_type)
        if kind == STRING:
            for _ in range(count):
                offset += 8 + int.from_bytes(data[offset : offset + 8], "little")
        else:
            offset += count * struct.calcsize(FORMATS[kind])
        return offset - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind)]


def dequantize(data: NDArray[Any], kind: gguf.GGMLQuantizationType) -> Any:
    """Unpack values as the gguf package does, but on all cores, some rows at a time."""
    if data.dtype != np.uint8:
        return _DEQUANTIZE(data, kind)
    out = np.empty(gguf.quant_shape_from_byte_shape(data.shape, kind), np.float32)
    packed = data.reshape(-1, data.shape[-1])
    unpacked = out.reshape(-1, out.shape[-1])

    def fill(start: int) -> None:
        unpacked[start : start + _ROWS] = _DEQUANTIZE(packed[start : start + _ROWS], kind)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, len(packed), _ROWS)))
    return out


def quick_gguf() -> AbstractContextManager[Any]:
    """Have transformers read files with these, and build the table of names once."""
    # transformers takes no reader, but looks the three up in the package whenever it reads a file:
    # this is the one place where ours can be.
    table = cache(gguf.get_tensor_name_map)
    return mock.patch.multiple(
        gguf, GGUFReader=QuickReader, dequantize=dequantize, get_tensor_name_map=table
    )
