"""An unfinished healing on disk, beside the checkpoint to be written, so that an interrupted one can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file, writing
from sleb_cli.engine.third_party import errors_of_the_disk
from sleb_cli.records import require_same_work
from sleb_plugins import OutputError, PlanError

_KEY = "sleb"

# Raise it when the same state would mean something else.
FORMAT = 3


@dataclass(frozen=True)
class Saved:
    """The saved state: plain data, and tensors by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]

    def tensor(self, name: str, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape, where None is any number above 0, and of finite numbers of this data type.

        Raises:
            PlanError: it is missing, or another one.
        """
        found = self.tensors.get(name)
        if (
            found is None
            or found.dtype is not dtype
            or len(found.shape) != len(shape)
            or any(side != wanted if wanted is not None else not side for side, wanted in zip(found.shape, shape))  # noqa: B905
            or not bool(found.isfinite().all())
        ):
            raise other_state(f"its {name} is missing, or is not what a healing saves")
        return found


def other_state(reason: str) -> PlanError:
    """Return the error for a state of this very healing that holds something else."""
    return PlanError(
        f"The saved healing cannot be resumed: {reason}.", hint="Start over with --force instead of --resume."
    )


class HealState:
    """The hidden folder beside `output` that holds the saved state, one file."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}.heal")
        self._file = self.folder / "state.safetensors"

    @property
    def exists(self) -> bool:
        """Whether there is an unfinished healing."""
        return self._file.exists()

    def require(self, *, resume: bool, force: bool) -> None:
        """Check, before any work, that no unfinished healing would be overwritten.

        Raises:
            OutputError: there is one, and neither `resume` nor `force` is set, or its place leads elsewhere.
        """
        if self.folder.is_symlink() or self._file.is_symlink():
            raise OutputError(
                f"{self.folder} is a link, or holds one, so an unfinished healing would be kept elsewhere.",
                hint="Remove it, or choose another place with -o.",
            )
        if self.exists and not (resume or force):
            raise OutputError(
                f"{self.folder} holds an unfinished healing.",
                hint="Continue it with --resume, or start over with --force.",
            )

    def may_replace(self, *, resume: bool, force: bool) -> bool:
        """Whether the output may replace another one, as an unfinished healing was allowed to.

        It may have been killed just after it wrote the output.
        """
        return force or (resume and self.exists)

    def read(self, identity: Mapping[str, Any]) -> Saved | None:
        """Return the saved state of this healing, or None if there is none.

        Raises:
            PlanError: the file cannot be read, is broken, or belongs to another healing, or another version of sleb
                began it; the message names the differences.
        """
        if not self._file.exists():
            return None
        broken = PlanError(
            f"{self._file} is broken, or was not written by sleb.",
            hint="Remove its folder, or start over with --force.",
        )
        if not self._file.is_file():
            raise broken
        try:
            with errors_of_the_disk(), safe_open(self._file, framework="pt") as file:
                data = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise PlanError(
                f"{self._file} cannot be read: {error.strerror or error}.", hint="Check the disk that it is on."
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise broken from error
        if not isinstance(data, dict) or not isinstance(data.get("identity"), dict):
            raise broken
        require_same_work(
            self.folder, "healing", data["identity"], {"format": FORMAT} | dict(identity), "plan, text and budget"
        )
        return Saved(data, tensors)

    def write(self, identity: Mapping[str, Any], saved: Saved) -> None:
        """Save, replacing what was saved before.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        text = json.dumps({"identity": {"format": FORMAT} | dict(identity)} | saved.data)
        with new_file(self._file) as aside, errors_of_the_disk():
            save_file(saved.tensors, aside, metadata={_KEY: text})

    def delete(self) -> None:
        """Delete the folder once the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
