"""The journal of a search: every score as it is measured, so that an interrupted search loses nothing.

The journal is a file next to the plan. Each line is a checksum and a JSON document; the first identifies the search,
the others hold one measurement each. Lines are only appended, so whatever stops the program, earlier lines stay
readable; an incomplete last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, ValidationError
from pydantic_core import from_json

from sleb_cli.atomic import writing
from sleb_cli.engine.forward.saved_walk import SavedWalk
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import comparable
from sleb_cli.events import Notice, Notify, Warned, ignore
from sleb_cli.records import Record, require_same_work
from sleb_plugins.errors import OutputError, PlanError

# A crash of the program loses nothing; a crash of the machine loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

# Raise it when the same document would mean something else.
FORMAT = 1

# No batch has enough sequences for its scores to take more.
LONGEST_LINE = 16 << 20

Name = tuple[tuple[int, ...], int | None, int | None]
"""What was measured: the removed blocks, the candidate, and the batch."""


def journal_of(plan: Path) -> Path:
    """Return the path of the journal of this plan."""
    return plan.with_name(plan.name + ".journal")


def saved_walk_of(plan: Path, search: Mapping[str, Any], rank: int) -> SavedWalk:
    """Return where a process saves its walks through a streamed model, beside the journal of this search."""
    identity = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()
    return SavedWalk(_walk_path(journal_of(plan), rank), identity)


def _walk_path(journal: Path, rank: int = 0) -> Path:
    return journal.with_name(f"{journal.name}.walk.{rank}")


def require_no_journal(path: Path, *, resume: bool, force: bool) -> None:
    """Refuse, before any work, to overwrite an unfinished search.

    Raises:
        OutputError: there is one, and neither `resume` nor `force` is set.
    """
    if path.exists() and not (resume or force):
        raise OutputError(
            f"{path} holds an unfinished search.", hint="Continue it with --resume, or start over with --force."
        )


def delete_journal(path: Path, notify: Notify) -> None:
    """Delete a journal, and the walks beside it, once the plan is written; the listener is told if that fails."""
    try:
        SavedWalk(_walk_path(path)).delete()
        path.unlink(missing_ok=True)
    except OSError as error:
        notify(Warned(f"{path} is no longer needed, but cannot be deleted: {error.strerror}."))


class Journal:
    """The one home of a search's scores: those of a candidate on a batch, and losses, by what was measured.

    The order of removed blocks has no meaning. If a metric scores `whole_models`, neither does which block is the
    candidate: 3 after 5 and 5 after 3 are the same model.

    Args:
        known: what was measured before.
        file: where measurements are added; without it, they are only in memory.
        whole_models: whether scores are of the model without all these blocks, rather than of the candidate.
        require_valid: raises if what is about to be recorded is not what it says.
    """

    def __init__(
        self,
        known: Iterable[tuple[Name, Sequence[float]]] = (),
        file: _File | None = None,
        *,
        whole_models: bool = False,
        require_valid: Callable[[], object] = lambda: None,
    ) -> None:
        self._file, self._whole_models, self._require_valid = file, whole_models, require_valid
        self._known = {self._key(*name): list(scores) for name, scores in known}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, removed: Sequence[int], block: int | None = None, batch: int | None = None) -> list[float] | None:
        """Return the measurement without `removed` and `block` on this batch, if there is one."""
        return self._known.get(self._key(removed, block, batch))

    def scores(self, removed: Sequence[int], block: int | None, batches: Iterable[int | None]) -> list[float]:
        """Return the scores on these batches, one after the other, as far as they were measured."""
        return [score for batch in batches for score in self.find(removed, block, batch) or ()]

    def add(
        self, scores: Sequence[float], removed: Sequence[int], block: int | None = None, batch: int | None = None
    ) -> None:
        """Record a measurement; what is not a finite number is null in the file, and infinite when it is found.

        Raises:
            OutputError: the file cannot be written.
            SlebError: what `require_valid` raises.
        """
        self._require_valid()
        self._known[self._key(removed, block, batch)] = [comparable(score) for score in scores]
        if self._file is not None:
            written = [score if math.isfinite(score) else None for score in scores]
            self._file.append({"removed": list(removed), "block": block, "batch": batch, "scores": written})

    def forget(self) -> None:
        """Drop all measurements, which turned out to be worthless."""
        self._known.clear()

    def sync(self) -> None:
        """Flush the journal to disk."""
        if self._file is not None:
            self._file.sync()

    def _key(self, removed: Sequence[int], block: int | None, batch: int | None) -> Name:
        gone = sorted(removed)
        if self._whole_models and block is not None:
            *gone, block = sorted([*removed, block])
        return tuple(gone), block, batch


@contextmanager
def open_journal(
    path: Path,
    search: Mapping[str, Any],
    notify: Notify = ignore,
    *,
    resume: bool = False,
    group: ProcessGroup | None = None,
    whole_models: bool = False,
    require_valid: Callable[[], object] = lambda: None,
) -> Iterator[Journal]:
    """Start a journal for `search`, or with `resume`, continue it. The main process writes it; all have what it holds.

    A journal without measurements is deleted in the end. For the other options, see `Journal`.

    Raises:
        OutputError: the file cannot be written, is none of its own, or another search is writing it.
        PlanError: the existing journal cannot be read, belongs to another search, or another version of sleb began
            it; the message names the differences.
    """
    group, file = group or ProcessGroup(), None
    if group.is_main:
        file = _File(path, {"format": FORMAT} | dict(search), resume=resume)
        if not resume:
            SavedWalk(_walk_path(path)).delete()
    known = group.from_main(lambda: file.measured if file else [])
    journal = Journal(known, file, whole_models=whole_models, require_valid=require_valid)
    if len(journal) and file:
        notify(Notice(f"Continuing with the {len(journal)} measurements in {path}."))
    try:
        yield journal
    except BaseException:
        if len(journal) and file:
            notify(Notice(f"All measurements are kept in {path}: rerun with --resume to continue."))
        raise
    finally:
        if file:
            file.close()
            if not len(journal):
                delete_journal(path, notify)


class _Measurement(Record):
    """A line of the file; a score that was not a finite number is null."""

    removed: tuple[int, ...]
    block: int | None
    batch: int | None
    scores: Annotated[tuple[float | None, ...], Field(min_length=1)]


class _File:
    """The file of a journal, open and locked; `measured` is what it held.

    Raises:
        OutputError: it cannot be written, is none of its own, or another search is writing it.
        PlanError: it cannot be read, belongs to another search, or another version of sleb began it.
    """

    def __init__(self, path: Path, search: Mapping[str, Any], *, resume: bool) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OutputError(
                f"{path} is a link, a folder, a pipe or a device, not a journal.",
                hint="Remove it, or choose another plan with -o.",
            )
        self.path, self.measured, self._synced = path, list[tuple[Name, list[float]]](), 0.0
        with writing(path):
            self._file = path.open("a+b")
        try:
            with writing(path):
                _lock(self._file, path)
            whole = self._read(search) if resume else 0
            with writing(path):
                self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise
        if not whole:
            self._write(json.dumps(search, separators=(",", ":"), allow_nan=False))
            self.sync()

    def _read(self, search: Mapping[str, Any]) -> int:
        """Read the complete lines, up to the first that is damaged, and return their length in bytes."""
        try:
            self._file.seek(0)
            header = self._file.readline(LONGEST_LINE)
            if not header:
                return 0
            found = _content(header)
            if found is None or not isinstance(begun := from_json(found), dict):
                raise ValueError
            require_same_work(self.path, "search", begun, search, "model, data, metric and settings")
            whole = len(header)
            while (found := _content(line := self._file.readline(LONGEST_LINE))) is not None:
                try:
                    of = _Measurement.model_validate_json(found)
                except ValidationError:
                    break
                scores = [math.inf if score is None else score for score in of.scores]
                self.measured.append(((of.removed, of.block, of.batch), scores))
                whole += len(line)
            return whole
        except ValueError as error:
            raise PlanError(
                f"{self.path} is not a sleb journal, or its first line is damaged.",
                hint="Delete it, or start over with --force.",
            ) from error
        except OSError as error:
            raise PlanError(
                f"The journal {self.path} cannot be read: {error.strerror}.",
                hint="Check the disk that it is on, or start over with --force.",
            ) from error

    def append(self, measurement: Mapping[str, Any]) -> None:
        self._write(json.dumps(measurement, separators=(",", ":"), allow_nan=False))
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def _write(self, document: str) -> None:
        text = document.encode()
        with writing(self.path):
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        with writing(self.path):
            self._file.close()


def _content(line: bytes) -> bytes | None:
    """Return what a line holds, if it is whole and its checksum right."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return text if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text) else None


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file against other searches, where the system supports it."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"Another search is writing {path}.", hint="Wait until it ends, or choose another plan with -o."
        ) from error
