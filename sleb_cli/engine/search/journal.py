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
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sleb_cli.atomic import writing
from sleb_cli.engine.forward.saved_walk import SavedWalk
from sleb_cli.engine.search.choices import comparable
from sleb_cli.events import Notify, Warned, ignore
from sleb_cli.records import require_same_work
from sleb_plugins.errors import OutputError, PlanError

# A crash of the program loses nothing; a crash of the machine loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

# Raise it when the same document would mean something else.
FORMAT = 1

# No batch has so many sequences that its scores take more.
LONGEST_LINE = 16 << 20

Removed = Sequence[int]
Key = tuple[tuple[int, ...], int | None, int | None]


def journal_of(plan: Path) -> Path:
    """Return the path of the journal of this plan."""
    return plan.with_name(plan.name + ".journal")


def saved_walk_of(plan: Path, search: Mapping[str, Any], rank: int) -> SavedWalk:
    """Return where a process saves its walks through a streamed model, beside the journal of this search."""
    identity = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()
    return SavedWalk(_walk_path(journal_of(plan), rank), identity)


def _walk_path(journal: Path, rank: int = 0) -> Path:
    return journal.with_name(f"{journal.name}.walk.{rank}")


class Journal:
    """The measurements of a search: scores of one candidate on one batch, or losses. Without a path, only in memory.

    The order of removed blocks has no meaning. If scores are `of_sets`, neither does which block is the candidate:
    3 after 5 and 5 after 3 are the same model.

    `require_valid` raises if what is about to be recorded is not what it says.
    """

    def __init__(self, path: Path | None = None, require_valid: Callable[[], object] = lambda: None) -> None:
        self.path = path
        self._require_valid = require_valid
        self.of_sets = False
        self.known: dict[Key, list[float]] = {}
        """The measurements by what was measured."""
        self._file: BinaryIO | None = None
        self._synced = 0.0

    def __len__(self) -> int:
        return len(self.known)

    def require(self, *, resume: bool, force: bool) -> None:
        """Refuse, before any work, to overwrite an unfinished search.

        Raises:
            OutputError: there is one, and neither `resume` nor `force` is set.
        """
        if self.path is not None and self.path.exists() and not (resume or force):
            raise OutputError(
                f"{self.path} holds an unfinished search.",
                hint="Continue it with --resume, or start over with --force.",
            )

    def open(self, search: Mapping[str, Any], *, resume: bool) -> None:
        """Start a journal for `search`; with `resume`, continue an existing one.

        Raises:
            OutputError: the file cannot be written, is none of its own, or another search is writing it.
            PlanError: the existing journal cannot be read, belongs to another search, or another version of sleb began
                it; the message names the differences.
        """
        if self.path is None:
            return
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise OutputError(
                f"{self.path} is a link, a folder, a pipe or a device, and no journal.",
                hint="Remove it, or choose another plan with -o.",
            )
        search = {"format": FORMAT} | dict(search)
        with writing(self.path):
            file = self.path.open("a+b")
        try:
            with writing(self.path):
                _lock(file, self.path)
            whole = 0
            if resume:
                with _reading(self.path):
                    file.seek(0)
                    whole = self._read(file, search)
            with writing(self.path):
                file.truncate(whole)
        except BaseException:
            file.close()
            raise
        self._file = file
        if not whole:
            self._append(search)
            self.sync()

    def find(self, removed: Removed, block: int | None = None, batch: int | None = None) -> list[float] | None:
        """Return the measurement without `removed` and `block` on this batch, if there is one."""
        return self.known.get(self._key(removed, block, batch))

    def add(
        self, scores: Sequence[float], removed: Removed, block: int | None = None, batch: int | None = None
    ) -> None:
        """Record a measurement; what is not a finite number is null in the file, and infinite when it is found.

        Raises:
            OutputError: the file cannot be written.
            SlebError: what `require_valid` raises.
        """
        self._require_valid()
        self.known[self._key(removed, block, batch)] = [comparable(score) for score in scores]
        written = [score if math.isfinite(score) else None for score in scores]
        self._append({"removed": list(removed), "block": block, "batch": batch, "scores": written})
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Flush the journal to disk."""
        if self._file is not None and self.path is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file, and delete it if it holds no measurement."""
        self.sync()
        file, self._file = self._file, None
        if file is not None and self.path is not None:
            with writing(self.path):
                file.close()
            if not self.known:
                self.delete()

    def delete(self, notify: Notify = ignore) -> None:
        """Delete the file, and the walks beside it, once its plan is written; the listener is told if that fails."""
        if self.path is not None:
            try:
                SavedWalk(_walk_path(self.path)).delete()
                self.path.unlink(missing_ok=True)
            except OSError as error:
                notify(Warned(f"{self.path} is no longer needed, but cannot be deleted: {error.strerror}."))

    def _key(self, removed: Removed, block: int | None, batch: int | None) -> Key:
        gone = sorted(removed)
        if self.of_sets and block is not None:
            *gone, block = sorted([*removed, block])
        return tuple(gone), block, batch

    def _append(self, document: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
            with writing(self.path):
                self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                self._file.flush()

    def _read(self, file: BinaryIO, search: Mapping[str, Any]) -> int:
        """Load the complete lines, up to the first that is damaged, and return their length in bytes."""
        whole, line = 0, b""
        while line := file.readline(LONGEST_LINE):
            document = _parse(line)
            if document is None or (whole and not _is_measurement(document)):
                break
            if self.path is not None and whole == 0:
                require_same_work(self.path, "search", document, search, "model, data, metric and settings")
            else:
                key = self._key(document["removed"], document["block"], document["batch"])
                self.known[key] = [math.inf if score is None else score for score in document["scores"]]
            whole += len(line)
        if line and not whole:
            raise PlanError(
                f"{self.path} is not a sleb journal, or its first line is damaged.",
                hint="Delete it, or start over with --force.",
            )
        return whole


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlanError(
            f"The journal {path} cannot be read: {error.strerror}.",
            hint="Check the disk that it is on, or start over with --force.",
        ) from error


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


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _is_measurement(document: Mapping[str, Any]) -> bool:
    """Whether a line says what was measured, and scores that are finite numbers, or null where they were not."""
    removed, scores = document.get("removed"), document.get("scores")
    return (
        isinstance(removed, list)
        and all(type(block) is int for block in removed)
        and all(name in document and type(document[name]) in (int, type(None)) for name in ("block", "batch"))
        and isinstance(scores, list)
        and len(scores) > 0
        and all(_is_finite(score) for score in scores if score is not None)
    )


def _is_finite(score: Any) -> bool:
    return type(score) in (int, float) and abs(score) <= sys.float_info.max
