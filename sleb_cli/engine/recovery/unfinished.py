"""The state of a recovery, kept in a hidden folder next to its output until the output is written.

Running the command again finds it, in a folder named after everything its values depend on. Each closed-form fit has a
file there, and so has a healing.
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
"""How many of a key's name are in the names of files."""

SUFFIX = ".recovery"
"""How the names of the hidden folders end."""
DAYS_KEPT = 30
"""After this many days without a change, a later recovery in the same place removes the folder."""
SECONDS_BETWEEN_SAVES = 60.0
MAX_SAVING_SHARE = 0.05
"""The largest share of the time that saves may take; slow ones are further apart."""
_OF_A_COMMAND = re.compile(r"(b?float(?:16|32|64))-(b?float(?:16|32|64))-[0-9a-f]{16}")
_OURS = re.compile(rf"{_OF_A_COMMAND.pattern}(/([\w-]+\.safetensors|\.\S+\.partial))?")


def read_saved(file: Path, kind: type[R]) -> tuple[R, dict[str, Tensor]]:
    """Read the record and the tensors of a saved file.

    Raises:
        PlanError: it cannot be read, or is broken.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            record = kind.model_validate_json((opened.metadata() or {}).get("record", ""))
            return record, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise PlanError(
            f"{file} cannot be read: {error.strerror or error}.", hint="Check the disk that it is on."
        ) from error
    except (SafetensorError, ValidationError, KeyError, TypeError, ValueError) as error:
        raise _broken(file) from error


def write_saved(file: Path, record: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Write a record and tensors to a file; it replaces what was saved before.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as aside, saving(file):
        metadata = {"record": record.model_dump_json()}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, aside, metadata=metadata)


class Saves:
    """A file that the main process saves a state to about every minute, and continues from.

    Attributes:
        file: the file.
        tensors: the state's tensors, which the work goes on changing.
        watch: the dense model's files, which must be the same at each save.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], watch: Watch, group: ProcessGroup) -> None:
        self.file, self.tensors, self.watch, self.group = file, tensors, watch, group
        self._saved_at, self._seconds = time.monotonic(), 0.0

    def restore(self, kind: type[R]) -> R | None:
        """Copy what was saved into the tensors, and return the record beside them; None if nothing was saved."""
        if not self.group.from_main(self.file.exists):
            return None
        record, saved = read_saved(self.file, kind)
        for name, tensor in self.tensors.items():
            new = saved.get(name)
            if new is None or (new.shape, new.dtype) != (tensor.shape, tensor.dtype) or not new.isfinite().all():
                raise _broken(self.file)
            tensor.copy_(new)
        return record

    def save(self, record: BaseModel) -> None:
        """Save the state."""
        if self.group.is_main:
            self.watch.require_unchanged()
            write_saved(self.file, record, self.tensors)

    def save_if_due(self, record: BaseModel) -> None:
        """Save the state if the last save is long ago."""
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
        """Return the folder for what has this key; its name begins with the data types."""
        return self.folder / f"{key['dtype']}-{key['stored']}-{name_of({**key, 'format': FORMAT})[:DIGITS]}"

    def dtype(self, stored: str) -> str | None:
        """Return the data type that the unfinished healing of such values computes in; None for none, or several."""
        folders = {file.parent.name for file in self.folder.glob("*/healing-*.safetensors")}
        dtypes = {match[1] for name in folders if (match := _OF_A_COMMAND.fullmatch(name)) and match[2] == stored}
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def size(self) -> int:
        """The bytes that it takes on the disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))

    @contextmanager
    def explain_resume_on_failure(self, notify: Notify) -> Iterator[None]:
        """Say what is kept if something fails or is interrupted in this context."""
        try:
            yield
        except BaseException:
            if any(self.folder.glob("*/*.safetensors")):
                notify(Notice(f"What was found is saved in {self.folder}: run the same command again to continue."))
            raise

    def require_no_links(self) -> None:
        """Check that nothing would be saved elsewhere.

        Raises:
            OutputError: the folder is or contains a link.
        """
        if self.folder.is_symlink() or any(path.is_symlink() for path in self.folder.rglob("*")):
            raise OutputError(
                f"{self.folder} is or contains a link, so an unfinished recovery would be saved elsewhere.",
                hint="Remove it, or choose another place with -o.",
            )

    def delete(self) -> None:
        """Delete the folder once the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fits_in(folder: Path) -> int:
    """Return the number of fits saved in the folder of a recovery."""
    return len([*folder.glob("block-*.safetensors"), *folder.glob("norm.safetensors")])


def fit_file(folder: Path, block: int | None) -> Path:
    """Return the file of a block's fit, or (None) of the final norm's."""
    return folder / ("norm.safetensors" if block is None else f"block-{block}.safetensors")


def clear_old(parent: Path) -> None:
    """Remove what recoveries that nobody continued left in a folder long ago."""
    with suppress(OSError):
        for folder in parent.glob(f".*{SUFFIX}"):
            files = [*folder.glob("*"), *folder.glob("*/*")]
            names = [path.relative_to(folder).as_posix() for path in files]
            is_ours = not folder.is_symlink() and files and all(map(_OURS.fullmatch, names))
            if is_ours and time.time() - max(path.lstat().st_mtime for path in files) > DAYS_KEPT * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def _broken(file: Path) -> PlanError:
    return PlanError(f"{file} is broken, or was not written by sleb.", hint="Remove it, and run the command again.")
