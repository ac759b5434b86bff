"""What a recovery has found so far, kept in a hidden folder next to its output until the output is written.

Each closed-form fit has a file, in a folder named after everything its values depend on, so the same command finds it
again. A healing has one file, which --resume continues.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file, writing
from sleb_cli.engine.text.windows import tokens_sha256
from sleb_cli.engine.third_party import saving
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import CalibrationRecord
from sleb_plugins import OutputError, PlanError

# Raise it when the same state would mean something else.
FORMAT = 4

SUFFIX = ".recovery"
"""How the names of the hidden folders end."""
DAYS_KEPT = 30
"""After this many days without a change, a later recovery in the same place removes the folder."""
_OURS = re.compile(r"fits-[0-9a-f]{16}|(healing|norm|block-\d+)\.safetensors|\.\S+\.safetensors\.partial")


@dataclass(frozen=True)
class Saved:
    """A file of a saved state: records in JSON and tensors, each by name."""

    file: Path
    records: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, file: Path, *, with_tensors: bool = True) -> Saved:
        """Read a file; without its tensors, that takes no time.

        Raises:
            PlanError: it cannot be read, or is broken.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys() if with_tensors else ()
                tensors = {name: opened.get_tensor(name) for name in names}
                return cls(file, opened.metadata() or {}, tensors)
        except OSError as error:
            raise PlanError(
                f"{file} cannot be read: {error.strerror or error}.", hint="Check the disk that it is on."
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _broken(file) from error

    def record(self, name: str, kind: Any) -> Any:
        """Return a record of this type.

        Raises:
            PlanError: it is missing, or another one.
        """
        try:
            return TypeAdapter(kind).validate_json(self.records.get(name, ""))
        except ValidationError as error:
            raise _broken(self.file) from error

    def text(self, name: str, record: CalibrationRecord) -> tuple[Tensor, Tensor | None]:
        """Return the sequences that the record describes, [sequences, length], and their loss mask, if they have one.

        Raises:
            PlanError: they are missing, or others.
        """
        shape = record.sequences, record.sequence_length
        found = self.tensor(name, shape, torch.int64)
        if tokens_sha256(found) != record.tokens_sha256:
            raise _broken(self.file)
        mask = f"{name}.mask"  # a part of a mixture may hold no conversation
        return found, self.tensor(mask, shape, torch.bool) if mask in self.tensors else None

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape and data type, whose numbers are finite.

        Raises:
            PlanError: it is missing, or another one.
        """
        found = self.tensors.get(name)
        if found is None or (found.shape, found.dtype) != (shape, dtype) or not bool(found.isfinite().all()):
            raise _broken(self.file)
        return found

    def write(self) -> None:
        """Write the file; it replaces what was saved before.

        Raises:
            OutputError: it cannot be written.
        """
        with writing(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.file) as aside, saving(self.file):
            save_file({name: tensor.cpu() for name, tensor in self.tensors.items()}, aside, metadata=dict(self.records))


class Unfinished:
    """What is unfinished of the recovery into `output`, in the hidden folder next to it."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}{SUFFIX}")
        self.healing = self.folder / "healing.safetensors"

    @property
    def dtype(self) -> str | None:
        """The data type that the unfinished healing computes in; None if there is none.

        Raises:
            PlanError: it cannot be read, or is broken.
        """
        if not self.healing.exists():
            return None
        found = Saved.read(self.healing, with_tensors=False).record("identity", dict[str, Any]).get("dtype")
        return found if isinstance(found, str) else None

    @contextmanager
    def explain_resume_on_failure(self, notify: Notify) -> Iterator[None]:
        """Say what is kept if something fails or is interrupted meanwhile."""
        try:
            yield
        except BaseException:
            if self.healing.exists():
                notify(Notice(f"Healing is saved in {self.folder}: rerun with --resume to continue."))
            elif any(self.folder.glob("fits-*/*.safetensors")):
                notify(Notice(f"The fits so far are saved in {self.folder}: run the same command again to continue."))
            raise

    def require(self, *, resume: bool, force: bool) -> None:
        """Check, before any work, that no unfinished healing would be overwritten.

        Raises:
            OutputError: there is one, and neither `resume` nor `force` is set, or its place leads elsewhere.
        """
        if self.folder.is_symlink() or any(path.is_symlink() for path in self.folder.rglob("*")):
            raise OutputError(
                f"{self.folder} is or contains a link, so an unfinished recovery would be saved elsewhere.",
                hint="Remove it, or choose another place with -o.",
            )
        if self.healing.exists() and not (resume or force):
            raise OutputError(
                f"{self.folder} holds an unfinished healing run.",
                hint="Continue it with --resume, or start over with --force.",
            )

    def delete(self) -> None:
        """Delete the folder once the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fit_file(folder: Path, block: int | None) -> Path:
    """Return the file of a block's fit, or (None) of the final norm's."""
    return folder / ("norm.safetensors" if block is None else f"block-{block}.safetensors")


def clear_old(parent: Path) -> None:
    """Remove what recoveries that nobody continued left in a folder long ago."""
    with suppress(OSError):
        for folder in parent.glob(f".*{SUFFIX}"):
            files = list(folder.glob("*")) + list(folder.glob("fits-*/*"))
            is_ours = not folder.is_symlink() and files and all(_OURS.fullmatch(path.name) for path in files)
            if is_ours and time.time() - max(path.lstat().st_mtime for path in files) > DAYS_KEPT * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def _broken(file: Path) -> PlanError:
    return PlanError(f"{file} is broken, or was not written by sleb.", hint="Remove it, and run the command again.")
