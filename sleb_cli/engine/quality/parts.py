"""Finished parts of evaluations, cached under everything that their numbers depend on.

An evaluation that was interrupted, or is repeated, finds what it measured before. A part is the scores of one model on
a few windows of a text, or on a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import chip_name
from sleb_cli.engine.files.cache import KeptFiles
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.events import Notify
from sleb_cli.version import __version__

T = TypeVar("T")

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

    def read(self, key: Mapping[str, Any], load: Callable[[bytes], T]) -> T | None:
        """Return the part that is kept under this key, if it is there and whole."""
        content = None if self._fresh else self._files.read(self._common | dict(key))
        try:
            return None if content is None else load(content)
        except (SafetensorError, ValueError):
            return None

    def write(self, key: Mapping[str, Any], content: bytes) -> None:
        """Write a part if the cache can be written; the evaluation does not depend on it.

        Raises:
            ModelError: the model's files have changed, so the part may not be theirs.
        """
        self._watch.require_unchanged()
        self._files.write(self._common | dict(key), content)
