"""The gguf package without what takes it long, for a model's weights: an array for each token, a table for each module.

For a vocabulary like Gemma's, its reader takes ten seconds, and transformers has it read one for the tokenizer's class,
one for the config and one for the weights. The table of tensors' names takes six for thirty blocks.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

import gguf

from sleb_cli.engine.gguf.file import ARRAY, FORMATS, STRING

_LONGEST = 1 << 12
"""No list is longer that has a value per block, or for the position in a rotation."""


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


def quick_gguf() -> AbstractContextManager[Any]:
    """Let transformers, which looks both up when it reads a file, use the reader above, and build one table."""
    return mock.patch.multiple(gguf, GGUFReader=QuickReader, get_tensor_name_map=cache(gguf.get_tensor_name_map))
