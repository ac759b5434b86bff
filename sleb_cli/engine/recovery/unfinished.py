"""What a recovery has found so far, kept in a hidden folder next to its output until the output is written.

Each closed-form fit has a file, under a key of everything its values depend on, so the same command finds it again. A
healing has one file, which --resume continues.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file, writing
from sleb_cli.engine.third_party import saving
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import FitRecord
from sleb_cli.records import require_same_work
from sleb_plugins import OutputError, PlanError

_KEY = "sleb"

# Raise it when the same state would mean something else.
FORMAT = 1

SUFFIX = ".recovery"
"""How the names of the hidden folders end."""
DAYS_KEPT = 30
"""After this many days without a change, a later recovery in the same place removes the folder."""
_OURS = re.compile(r"healing\.safetensors|fits-[0-9a-f]{16}|(norm|block-\d+)\.safetensors")


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


class SavedFits:
    """The fits of one recovery in closed form; `identity` names all that their values depend on."""

    def __init__(self, place: Path, identity: Mapping[str, Any]) -> None:
        self._place = place
        named = json.dumps({"format": FORMAT} | dict(identity), sort_keys=True)
        key = hashlib.sha256(named.encode()).hexdigest()
        self._folder = place / f"fits-{key[:16]}"

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.safetensors")))

    def _file(self, block: int | None) -> Path:
        return self._folder / ("norm.safetensors" if block is None else f"block-{block}.safetensors")

    def read(self, block: int | None) -> tuple[FitRecord, dict[str, Tensor]] | None:
        """Return the record of a block's fit (None: of the final norm) and its new values; None if it is not saved.

        Raises:
            PlanError: the file cannot be read, or is broken.
        """
        if not (file := self._file(block)).exists():
            return None
        text, values = _read(file)
        try:
            return FitRecord.model_validate_json(text), values
        except ValidationError as error:
            raise _broken(file) from error

    def write(self, record: FitRecord, values: Mapping[str, Tensor]) -> None:
        """Save a fit; one that is not kept has no values.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self._place):
            self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._file(record.block), record.model_dump_json(), values)


class Unfinished:
    """What is unfinished of the recovery into `output`, in the hidden folder next to it."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}{SUFFIX}")
        self._file = self.folder / "healing.safetensors"

    @property
    def exists(self) -> bool:
        """Whether there is an unfinished healing."""
        return self._file.exists()

    @contextmanager
    def told_on_failure(self, notify: Notify) -> Iterator[None]:
        """Say what is kept if something fails or is interrupted meanwhile."""
        try:
            yield
        except BaseException:
            if self.exists:
                notify(Notice(f"The healing is kept in {self.folder}: rerun with --resume to continue."))
            elif any(self.folder.glob("fits-*/*.safetensors")):
                notify(Notice(f"The fits so far are kept in {self.folder}: run the same command again to continue."))
            raise

    def require(self, *, resume: bool, force: bool) -> None:
        """Check, before any work, that no unfinished healing would be overwritten.

        Raises:
            OutputError: there is one, and neither `resume` nor `force` is set, or its place leads elsewhere.
        """
        if self.folder.is_symlink() or any(path.is_symlink() for path in self.folder.rglob("*")):
            raise OutputError(
                f"{self.folder} is a link, or holds one, so an unfinished recovery would be kept elsewhere.",
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
        text, tensors = _read(self._file)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _broken(self._file) from error
        if not isinstance(data, dict) or not isinstance(data.get("identity"), dict):
            raise _broken(self._file)
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
        _write(self._file, json.dumps({"identity": {"format": FORMAT} | dict(identity)} | saved.data), saved.tensors)

    def delete(self) -> None:
        """Delete the folder once the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def clear_old(parent: Path) -> None:
    """Remove what recoveries that nobody continued left in a folder long ago."""
    with suppress(OSError):
        for folder in parent.glob(f".*{SUFFIX}"):
            files = list(folder.glob("*")) + list(folder.glob("fits-*/*"))
            is_ours = not folder.is_symlink() and files and all(_OURS.fullmatch(path.name) for path in files)
            if is_ours and time.time() - max(path.lstat().st_mtime for path in files) > DAYS_KEPT * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the text and the tensors of a file.

    Raises:
        PlanError: it cannot be read, or is broken.
    """
    if not file.is_file():
        raise _broken(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata()[_KEY], {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise PlanError(
            f"{file} cannot be read: {error.strerror or error}.", hint="Check the disk that it is on."
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _broken(file) from error


def _write(file: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    with new_file(file) as aside, saving(file):
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, aside, metadata={_KEY: text})


def _broken(file: Path) -> PlanError:
    return PlanError(
        f"{file} is broken, or was not written by sleb.", hint="Remove its folder, or start over with --force."
    )
