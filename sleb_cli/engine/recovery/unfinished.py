"""The state of a recovery, kept in a hidden folder next to its output until the output is written.

Its subfolders are named after everything that values depend on, so the same command finds them
again. Each closed-form fit has a file there, and so has a healing.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb_cli.atomic import new_file, writing
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.third_party import saving
from sleb_cli.events import Notice, Notify
from sleb_cli.keys import Key, name_of
from sleb_plugins import OutputError, PlanError

R = TypeVar("R", bound=BaseModel)

# Raise it when the same state would mean something else.
FORMAT = 5

DIGITS = 16
"""How many digits of a hash are in file names."""

SUFFIX = ".recovery"
"""How the names of the hidden folders end."""
DAYS_KEPT = 30
"""After this many days without a change, a later recovery in the same place removes the folder."""
SECONDS_BETWEEN_SAVES = 60.0
MAX_SAVING_SHARE = 0.05
"""The largest share of the time that saves may take; slow ones are further apart."""
_STATE_FOLDER = re.compile(r"(b?float(?:16|32|64))-(b?float(?:16|32|64))-[0-9a-f]{16}")
_STATE_PATH = re.compile(rf"{_STATE_FOLDER.pattern}(/([\w-]+\.safetensors|\.\S+\.partial))?")


def read_saved(file: Path, kind: type[R]) -> tuple[R, dict[str, Tensor]]:
    """Read the record and the tensors of a saved file; raise a PlanError if it is broken."""
    try:
        with safe_open(file, framework="pt") as opened:
            record = kind.model_validate_json((opened.metadata() or {}).get("record", ""))
            return record, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise PlanError(
            f"{file} cannot be read: {error.strerror or error}.",
            hint="Check the disk that it is on.",
        ) from error
    except (SafetensorError, ValidationError, KeyError, TypeError, ValueError) as error:
        raise _broken(file) from error


def write_saved(file: Path, record: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Write a record and tensors to a file, in place of an earlier one."""
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as aside, saving(file):
        metadata = {"record": record.model_dump_json()}
        save_file(
            {name: tensor.cpu() for name, tensor in tensors.items()}, aside, metadata=metadata
        )


class Saves:
    """A file to which the main process saves a state about every minute; `watch` guards the dense
    model's files.
    """

    def __init__(
        self, file: Path, tensors: Mapping[str, Tensor], watch: Watch, group: ProcessGroup
    ) -> None:
        self.file, self.tensors, self.watch, self.group = file, tensors, watch, group
        self._saved_at, self._seconds = time.monotonic(), 0.0

    def restore(self, kind: type[R]) -> R | None:
        """Copy the saved values into the tensors, and return the saved record; None if nothing was
        saved.
        """
        if not self.group.from_main(self.file.exists):
            return None
        record, saved = read_saved(self.file, kind)
        for name, tensor in self.tensors.items():
            new = saved.get(name)
            if (
                new is None
                or (new.shape, new.dtype) != (tensor.shape, tensor.dtype)
                or not new.isfinite().all()
            ):
                raise _broken(self.file)
            tensor.copy_(new)
        return record

    def save(self, record: BaseModel) -> None:
        """Save the state."""
        if self.group.is_main:
            self.watch.require_unchanged()
            write_saved(self.file, record, self.tensors)

    def save_if_due(self, record: BaseModel) -> None:
        """Save the state unless the last save is recent."""
        began = time.monotonic()
        if began - self._saved_at >= max(SECONDS_BETWEEN_SAVES, self._seconds / MAX_SAVING_SHARE):
            self.save(record)
            self._saved_at = time.monotonic()
            self._seconds = self._saved_at - began


class Unfinished:
    """The unfinished recovery into `output`, in the hidden folder next to it."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}{SUFFIX}")

    def folder_for(self, key: Key) -> Path:
        """Return the folder of a key, whose name begins with the data types."""
        return (
            self.folder
            / f"{key['dtype']}-{key['stored']}-{name_of({**key, 'format': FORMAT})[:DIGITS]}"
        )

    def dtype(self, stored: str) -> str | None:
        """Return the data type in which the unfinished healing of `stored` values computes, if
        there is just one.
        """
        folders = {file.parent.name for file in self.folder.glob("*/healing-*.safetensors")}
        dtypes = {
            match[1]
            for name in folders
            if (match := _STATE_FOLDER.fullmatch(name)) and match[2] == stored
        }
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def size(self) -> int:
        """Its bytes on the disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))

    @contextmanager
    def explain_resume_on_failure(self, notify: Notify) -> Iterator[None]:
        """Within this context, say how to continue after a failure or an interrupt."""
        try:
            yield
        except BaseException:
            if any(self.folder.glob("*/*.safetensors")):
                notify(
                    Notice(
                        f"What was found is saved in {self.folder}: run the same command again to "
                        f"continue."
                    )
                )
            raise

    def require_no_links(self) -> None:
        """Raise an OutputError if a link would have the state saved elsewhere."""
        if self.folder.is_symlink() or any(path.is_symlink() for path in self.folder.rglob("*")):
            raise OutputError(
                f"{self.folder} is or contains a link, so an unfinished recovery would be saved "
                f"elsewhere.",
                hint="Remove it, or choose another place with -o.",
            )

    def delete(self) -> None:
        """Delete the folder once the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def count_fits(folder: Path) -> int:
    """Count the fits in a recovery's folder."""
    return len([*folder.glob("block-*.safetensors"), *folder.glob("norm.safetensors")])


def fit_file(folder: Path, block: int | None) -> Path:
    """Return the file of a block's fit (None: the final norm's)."""
    return folder / ("norm.safetensors" if block is None else f"block-{block}.safetensors")


def clear_old(parent: Path) -> None:
    """Remove recoveries that nobody continued for long from a folder."""
    with suppress(OSError):
        for folder in parent.glob(f".*{SUFFIX}"):
            files = [*folder.glob("*"), *folder.glob("*/*")]
            names = [path.relative_to(folder).as_posix() for path in files]
            is_ours = not folder.is_symlink() and files and all(map(_STATE_PATH.fullmatch, names))
            if (
                is_ours
                and time.time() - max(path.lstat().st_mtime for path in files) > DAYS_KEPT * 86400
            ):
                shutil.rmtree(folder, ignore_errors=True)


def _broken(file: Path) -> PlanError:
    return PlanError(
        f"{file} is broken, or was not written by sleb.",
        hint="Remove it, and run the command again.",
    )
