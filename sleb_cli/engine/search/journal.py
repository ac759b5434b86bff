"""The journal of a search: every score as it is measured, so that an interrupted search loses nothing.

The journal is a file next to the plan. Each line is a checksum and a JSON document; the first identifies the search,
the others hold one measurement each. Lines are only appended, so whatever stops the program, earlier lines stay
readable; an incomplete last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sleb_cli.atomic import writing
from sleb_cli.engine.forward.saved_walk import SavedWalk
from sleb_cli.records import differences
from sleb_plugins.errors import OutputError, PlanError

# A crash of the program loses nothing; a crash of the machine loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

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
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
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
            OutputError: the file cannot be written, or another search is writing it.
            PlanError: the existing journal belongs to another search; the message names the differences.
        """
        if self.path is None:
            return
        with writing(self.path):
            file = self.path.open("a+b")
        try:
            _lock(file, self.path)
            file.seek(0)
            whole = self._read(file.read(), search) if resume else 0
            with writing(self.path):
                file.truncate(whole)
        except BaseException:
            file.close()
            raise
        self._file = file
        if not whole:
            self._append(dict(search))
            self.sync()

    def find(self, removed: Removed, block: int | None = None, batch: int | None = None) -> list[float] | None:
        """Return the measurement without `removed` and `block` on this batch, if there is one."""
        return self.known.get(self._key(removed, block, batch))

    def add(
        self, scores: Sequence[float], removed: Removed, block: int | None = None, batch: int | None = None
    ) -> None:
        """Record a measurement."""
        self.known[self._key(removed, block, batch)] = list(scores)
        self._append({"removed": list(removed), "block": block, "batch": batch, "scores": list(scores)})
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

    def delete(self) -> None:
        """Delete the file, and the walks beside it, once its plan is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            SavedWalk(_walk_path(self.path)).delete()

    def _key(self, removed: Removed, block: int | None, batch: int | None) -> Key:
        gone = sorted(removed)
        if self.of_sets and block is not None:
            *gone, block = sorted([*removed, block])
        return tuple(gone), block, batch

    def _append(self, document: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            text = json.dumps(document, separators=(",", ":")).encode()
            with writing(self.path):
                self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                self._file.flush()

    def _read(self, content: bytes, search: Mapping[str, Any]) -> int:
        """Load the complete lines, and return their length in bytes."""
        whole = 0
        for line in content.splitlines(keepends=True):
            document = _parse(line)
            if document is None:
                break
            if whole == 0:
                if found := differences(search, document):
                    raise PlanError(
                        f"{self.path} belongs to another search ({found}).",
                        hint="Use the same model, data, metric and settings, or start over with --force.",
                    )
            else:
                key = self._key(document["removed"], document["block"], document["batch"])
                self.known[key] = document["scores"]
            whole += len(line)
        if content and not whole:
            raise PlanError(
                f"{self.path} is not a sleb journal, or its first line is damaged.",
                hint="Delete it, or start over with --force.",
            )
        return whole


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
    document: dict[str, Any] = json.loads(text)
    return document
