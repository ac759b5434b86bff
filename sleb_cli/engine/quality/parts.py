"""Finished parts of evaluations, cached under everything that their numbers depend on.

An evaluation that was interrupted, or is repeated, finds what it measured before. A part is the scores of one model on
a few windows of a text, or on a task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sleb_cli.atomic import to_json
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import chip_name
from sleb_cli.engine.files.cache import KeptFiles
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.events import Notify
from sleb_cli.version import __version__

# Raise it when the numbers change but the key does not, between two versions of sleb.
VERSION = 1

FOLDER = "evaluations"


class Parts:
    """The parts of evaluations of one model in one data type on one kind of device."""

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        notify: Notify,
        *,
        fresh: bool,
        can_write: bool = True,
    ) -> None:
        self._common = {
            "version": VERSION,
            "sleb": __version__,
            "model": architecture.source.behavior,
            "dtype": dtype_name(dtype),
            "device": device.type,
            "chip": chip_name(device),
            "matmul": torch.get_float32_matmul_precision(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }
        self._watch, self._fresh = architecture.source.watch, fresh
        self._files = KeptFiles(FOLDER, "Results are", notify, can_write=can_write)

    def tensors(self, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors kept under this key, if any."""
        content = self._read(key)
        try:
            return None if content is None else load(content)
        except SafetensorError:
            return None

    def keep_tensors(self, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under this key."""
        self._write(key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def document(self, key: Mapping[str, Any]) -> Any:
        """Return the data kept under this key, or None."""
        content = self._read(key)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def keep_document(self, key: Mapping[str, Any], document: Any) -> None:
        """Keep data for JSON under this key."""
        self._write(key, to_json(document).encode())

    def _read(self, key: Mapping[str, Any]) -> bytes | None:
        return None if self._fresh else self._files.read(self._common | dict(key))

    def _write(self, key: Mapping[str, Any], content: bytes) -> None:
        """Write a part if the cache can be written; the evaluation does not depend on it.

        Raises:
            ModelError: the model's files have changed, so the part may not be theirs.
        """
        self._watch.require_unchanged()
        self._files.write(self._common | dict(key), content)
