"""An unfinished healing on disk, beside the checkpoint to be written, so that an interrupted one can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file, writing
from sleb_cli.records import differences
from sleb_plugins import OutputError, PlanError

_KEY = "sleb"


@dataclass(frozen=True)
class Saved:
    """The saved state: plain data, and tensors by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]


class HealState:
    """The hidden folder beside `output` that holds the saved state, one file."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}.heal")
        self._file = self.folder / "state.safetensors"

    def require(self, *, resume: bool, force: bool) -> None:
        """Check, before any work, that no unfinished healing would be overwritten.

        Raises:
            OutputError: there is one, and neither `resume` nor `force` is set.
        """
        if self._file.exists() and not (resume or force):
            raise OutputError(
                f"{self.folder} holds an unfinished healing.",
                hint="Continue it with --resume, or start over with --force.",
            )

    def read(self, identity: Mapping[str, Any]) -> Saved | None:
        """Return the saved state of this healing, or None if there is none.

        Raises:
            PlanError: the file is broken, or belongs to another healing; the message names the differences.
        """
        if not self._file.exists():
            return None
        try:
            with safe_open(self._file, framework="pt") as file:
                data = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError) as error:
            raise PlanError(
                f"{self._file} is broken, or was not written by sleb.",
                hint="Remove its folder, or start over with --force.",
            ) from error
        if found := differences(identity, data["identity"]):
            raise PlanError(
                f"{self.folder} belongs to another healing ({found}).",
                hint="Use the same plan, text and budget, or start over with --force.",
            )
        return Saved(data, tensors)

    def write(self, identity: Mapping[str, Any], saved: Saved) -> None:
        """Save, replacing what was saved before.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        text = json.dumps({"identity": dict(identity)} | saved.data)
        with new_file(self._file) as aside:
            save_file(saved.tensors, aside, metadata={_KEY: text})

    def delete(self) -> None:
        """Delete the folder once the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
