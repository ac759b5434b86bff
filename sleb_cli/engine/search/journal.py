"""The journal of a search: every score as it is measured, so that an interrupted search loses
nothing.

It is a file next to the plan. Each line is a checksum and a JSON document; the first identifies the
search, the others hold one measurement each. Lines are only appended, so whatever stops the
program, earlier lines stay readable.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO

from pydantic import Field, ValidationError
from pydantic_core import from_json

from sleb_cli.atomic import writing
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import comparable
from sleb_cli.events import Notice, Notify, Warned, ignore
from sleb_cli.records import Record, differences
from sleb_plugins.errors import OutputError, PlanError

# A crash of the program loses nothing; a crash of the machine loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

# Raise it when the same document would mean something else.
FORMAT = 1

# No batch has enough sequences for its scores to take more.
MAX_LINE_BYTES = 16 << 20

Name = tuple[tuple[int, ...], int | None, int | None]
"""The removed blocks, the candidate, and the batch of a measurement."""

Measurement = tuple[Name, list[float]]
"""Its name, and the score of each sequence."""


def recorded_settings(journal: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read these settings, if they have these types, from an unfinished search's journal; none if
    it is unreadable.
    """
    if journal.is_symlink() or not journal.is_file():  # reading a pipe would wait
        return {}
    try:
        with journal.open("rb") as file:
            begun = from_json(_intact_json(file.readline(MAX_LINE_BYTES)) or b"")
            settings = begun | begun["search"]
            return {
                name: settings[name]
                for name, kind in kinds.items()
                if isinstance(settings[name], kind)
            }
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def delete_journal(path: Path, notify: Notify) -> None:
    """Delete a journal once the plan is written; warn if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        notify(Warned(f"{path} is no longer needed, but cannot be deleted: {error.strerror}."))


class _Line(Record):
    """A line of the file; null stands for a score that is not finite."""

    removed: tuple[int, ...]
    block: int | None
    batch: int | None
    scores: Annotated[tuple[float | None, ...], Field(min_length=1)]


class Journal:
    """Scores measured so far, by removed blocks, candidate and batch.

    The order of removed blocks has no meaning. If a metric scores `whole_models`, neither does
    which block is the candidate: 3 after 5 and 5 after 3 are the same model. Without a path,
    measurements are only in memory. The main process writes the file, and all know its content.
    `search` identifies the search; `require_valid` raises if a measurement about to be recorded is
    not of the model that it names.
    """

    def __init__(
        self,
        path: Path | None = None,
        search: Mapping[str, Any] = MappingProxyType({}),
        *,
        resume: bool = False,
        group: ProcessGroup | None = None,
        whole_models: bool = False,
        require_valid: Callable[[], object] = lambda: None,
    ) -> None:
        self._path, self._whole_models, self._require_valid = path, whole_models, require_valid
        self._known: dict[Name, list[float]] = {}
        self._new: list[Measurement] = []
        self._file: BinaryIO | None = None
        self._synced = 0.0
        self.group = group or ProcessGroup()
        if path is not None and self.group.is_main:
            self._open(path, {"format": FORMAT} | dict(search), resume=resume)
        self._known = self.group.from_main(lambda: self._known)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def is_saved(self) -> bool:
        """Whether this process has written measurements to the file."""
        return self._file is not None and bool(self._known)

    def find(
        self, removed: Sequence[int], block: int | None = None, batch: int | None = None
    ) -> list[float] | None:
        """Return the measurement without `removed` and `block` on this batch, if there is one."""
        return self._known.get(self._key(removed, block, batch))

    def scores(
        self, removed: Sequence[int], block: int | None, batches: Iterable[int | None]
    ) -> list[float]:
        """Return the scores on these batches in turn, without batches that were not measured."""
        return [score for batch in batches for score in self.find(removed, block, batch) or ()]

    def add(
        self,
        scores: Sequence[float],
        removed: Sequence[int],
        block: int | None = None,
        batch: int | None = None,
    ) -> None:
        """Record a measurement; a score that is not finite is null in the file, and infinite when
        it is read.
        """
        self._new.append(((tuple(removed), block, batch), list(scores)))
        self._record(scores, removed, block, batch)

    def exchange(self) -> list[list[Measurement]]:
        """Record all processes' measurements since the last exchange, and return them by rank."""
        measured = self.group.gather(self._new)
        self._new = []
        for rank, theirs in enumerate(measured):
            for name, scores in theirs if rank != self.group.rank else ():
                self._record(scores, *name)
        return measured

    def forget(self) -> None:
        """Drop all measurements, because they turned out to be worthless."""
        self._known.clear()

    def sync(self) -> None:
        """Flush the journal to disk."""
        if self._file is not None and self._path is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; delete it if it has no measurement."""
        if self._file is not None and self._path is not None:
            self.sync()
            with writing(self._path):
                self._file.close()
            if not self._known:
                delete_journal(self._path, ignore)

    def _record(
        self, scores: Sequence[float], removed: Sequence[int], block: int | None, batch: int | None
    ) -> None:
        self._require_valid()
        self._known[self._key(removed, block, batch)] = [comparable(score) for score in scores]
        written = [score if math.isfinite(score) else None for score in scores]
        self._append({"removed": list(removed), "block": block, "batch": batch, "scores": written})
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def _key(self, removed: Sequence[int], block: int | None, batch: int | None) -> Name:
        gone = sorted(removed)
        if self._whole_models and block is not None:
            *gone, block = sorted([*removed, block])
        return tuple(gone), block, batch

    def _open(self, path: Path, search: Mapping[str, Any], *, resume: bool) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OutputError(
                f"{path} is a link, a folder, a pipe or a device, not a journal.",
                hint="Remove it, or choose another plan with -o.",
            )
        with writing(path):
            file = path.open("a+b")
        try:
            whole = self._read(file, path, search) if resume else 0
            with writing(path):
                file.truncate(whole)
        except BaseException:
            file.close()
            raise
        self._file = file
        if not whole:
            self._append(search)
            self.sync()

    def _read(self, file: BinaryIO, path: Path, search: Mapping[str, Any]) -> int:
        # Returns the length in bytes of the complete lines, up to the first that is damaged.
        try:
            file.seek(0)
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return 0
            begun = from_json(_intact_json(line) or b"")
            if not isinstance(begun, dict):
                raise ValueError
            if begun.get("format") != search["format"]:
                raise PlanError(
                    f"Another version of sleb began the search in {path}.",
                    hint="Finish it with that version, or start over with --force.",
                )
            if differing := differences(search, begun):
                raise PlanError(
                    f"{path} belongs to another search ({differing}).",
                    hint="Use the same model, data, metric and settings, or start over with "
                    "--force.",
                )
            whole = len(line)
            while (content := _intact_json(line := file.readline(MAX_LINE_BYTES))) is not None:
                try:
                    parsed = _Line.model_validate_json(content)
                except ValidationError:
                    break
                scores = [math.inf if score is None else score for score in parsed.scores]
                self._known[self._key(parsed.removed, parsed.block, parsed.batch)] = scores
                whole += len(line)
            return whole
        except ValueError as error:
            raise PlanError(
                f"{path} is not a sleb journal, or its first line is damaged.",
                hint="Delete it, or start over with --force.",
            ) from error
        except OSError as error:
            raise PlanError(
                f"The journal {path} cannot be read: {error.strerror}.",
                hint="Check the disk that it is on, or start over with --force.",
            ) from error

    def _append(self, document: Mapping[str, Any]) -> None:
        if self._file is not None and self._path is not None:
            # In one write, so that a crash leaves at most an incomplete last line.
            text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
            with writing(self._path):
                self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                self._file.flush()


@contextmanager
def open_journal(
    path: Path,
    search: Mapping[str, Any],
    notify: Notify = ignore,
    *,
    resume: bool = False,
    **options: Any,
) -> Iterator[Journal]:
    """Start a journal for `search`, or with `resume`, continue it; for `options`, see `Journal`.

    Raises:
        OutputError: the file cannot be written, or is no journal.
        PlanError: the journal cannot be read, or belongs to another search or version of sleb.
    """
    journal = Journal(path, search, resume=resume, **options)
    if journal.is_saved:
        notify(Notice(f"Continuing with the {len(journal)} measurements in {path}."))
    try:
        yield journal
    except BaseException:
        if journal.is_saved:
            notify(Notice(f"All measurements are kept in {path}: rerun with --resume to continue."))
        raise
    finally:
        journal.close()


def _intact_json(line: bytes) -> bytes | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return text if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text) else None
