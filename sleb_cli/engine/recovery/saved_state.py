"""The file that keeps what an unfinished recovery has found, next to its output.

Its name has the data types, and a hash of all that the values depend on: the same command finds it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.third_party import saving
from sleb_cli.events import Notice, Notify
from sleb_cli.keys import Key, name_of
from sleb_plugins import PlanError

R = TypeVar("R", bound=BaseModel)

FORMAT = 9
"""Raise it when the same state would mean something else."""
DIGITS = 16
"""How many digits of a hash are in a file name."""
SUFFIX = ".recovery"
DAYS_KEPT = 30
"""After this many days without a change, a later command in the same folder removes the file."""
SECONDS_BETWEEN_SAVES = 60.0
MAX_SAVING_SHARE = 0.05
"""The largest share of the time that saves may take; slow ones are further apart."""
_FILE_NAME = re.compile(rf"\..+\.(\w+)-(\w+)-[0-9a-f]{{{DIGITS}}}{re.escape(SUFFIX)}")


class SavedState:
    """The state of a recovery: a record and tensors of each stage, by a name of the stage.

    `watch` guards the dense model's files: after a change, nothing is saved.
    """

    def __init__(self, output: Path, key: Key, watch: Watch) -> None:
        digits = name_of({**key, "format": FORMAT})[:DIGITS]
        name = f"{key['dtype']}-{key['stored']}-{digits}"
        self.file = output.absolute().with_name(f".{output.name}.{name}{SUFFIX}")
        self._watch = watch
        self._records: dict[str, str] = {}
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self._saved_at = time.monotonic()
        self._seconds = 0.0
        if self.file.is_symlink():  # it may lead anywhere
            raise self._broken()
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        try:
            with safe_open(self.file, framework="pt") as opened:
                self._records = opened.metadata() or {}
                for stage in self._records:
                    prefix = f"{stage}/"
                    self._tensors[stage] = {
                        name.removeprefix(prefix): opened.get_tensor(name)
                        for name in opened.keys()  # noqa: SIM118 (no mapping)
                        if name.startswith(prefix)
                    }
        except OSError as error:
            raise PlanError(
                f"{self.file} cannot be read: {error.strerror or error}.",
                hint="Check the disk that it is on.",
            ) from error
        except SafetensorError as error:
            raise self._broken() from error

    def _broken(self) -> PlanError:
        return PlanError(
            f"{self.file} is broken, or was not written by sleb.",
            hint="Remove it, and run the command again.",
        )

    def find(self, stage: str, kind: type[R]) -> tuple[R, Mapping[str, Tensor]] | None:
        """Return a stage's record and tensors, or None if there are none yet.

        Raises:
            PlanError: the file is broken.
        """
        if stage not in self._records:
            return None
        try:
            record = kind.model_validate_json(self._records[stage])
        except ValidationError as error:
            raise self._broken() from error
        return record, self._tensors[stage]

    def restore(self, stage: str, kind: type[R], tensors: Mapping[str, Tensor]) -> R | None:
        """Copy a stage's saved values into tensors of the same names; return its record.

        Raises:
            PlanError: the file is broken.
        """
        state = self.find(stage, kind)
        if state is None:
            return None
        record, saved = state
        for name, tensor in tensors.items():
            value = saved.get(name)
            if value is None or value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise self._broken()
            if not value.isfinite().all():
                raise self._broken()
            tensor.copy_(value)
        return record

    def save(self, stage: str, record: BaseModel, tensors: Mapping[str, Tensor]) -> None:
        """Write a stage's record and tensors to the file, beside other stages'."""
        self._watch.require_unchanged()
        self._records[stage] = record.model_dump_json()
        self._tensors[stage] = tensors
        named: dict[str, Tensor] = {}
        for of_stage, values in self._tensors.items():
            for name, tensor in values.items():
                named[f"{of_stage}/{name}"] = tensor.cpu()
        began = time.monotonic()
        with new_file(self.file) as aside, saving(self.file):
            save_file(named, aside, metadata=self._records)
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - began

    def save_if_due(self, stage: str, record: BaseModel, tensors: Mapping[str, Tensor]) -> None:
        """Save like `save`, unless the last save is recent."""
        pause = max(SECONDS_BETWEEN_SAVES, self._seconds / MAX_SAVING_SHARE)
        if time.monotonic() - self._saved_at >= pause:
            self.save(stage, record, tensors)


def begun_dtype(output: Path, stored: str) -> str | None:
    """Return the data type of an unfinished recovery to `stored` values, if there is just one."""
    dtypes: set[str] = set()
    for file in _files_of(output):
        match = _FILE_NAME.fullmatch(file.name)
        if match and match[2] == stored:
            dtypes.add(match[1])
    return dtypes.pop() if len(dtypes) == 1 else None


def saved_bytes(output: Path) -> int:
    """Return the bytes on the disk of unfinished recoveries into `output`."""
    return sum(file.stat().st_size for file in _files_of(output))


@contextmanager
def explain_resume_on_failure(output: Path, notify: Notify) -> Iterator[None]:
    """Within this context, say how to continue after a failure or an interrupt."""
    try:
        yield
    except BaseException:
        for file in _files_of(output):
            notify(
                Notice(
                    f"What was found is saved in {file}: run the same command again to continue."
                )
            )
        raise


def delete_states(output: Path) -> None:
    """Delete unfinished recoveries into `output`, once it is written."""
    for file in _files_of(output):
        file.unlink(missing_ok=True)


def clear_old(folder: Path) -> None:
    """Remove recoveries that nobody continued for long from a folder."""
    oldest = time.time() - DAYS_KEPT * 86400
    with suppress(OSError):  # such as the file of another user
        for file in folder.glob(f".*{SUFFIX}"):
            if _FILE_NAME.fullmatch(file.name) and file.lstat().st_mtime < oldest:
                file.unlink()


def _files_of(output: Path) -> list[Path]:
    files = output.absolute().parent.glob(f".{escape(output.name)}.*{SUFFIX}")
    return [file for file in files if _FILE_NAME.fullmatch(file.name)]
