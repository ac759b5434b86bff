"""The journal of a search: every score as it is measured, so an interruption loses nothing.

It is a file next to the plan. Each line is a JSON document; the first identifies the search, the
others hold one measurement each. Lines are only appended, so whatever stops the program, earlier
lines stay readable.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sleb_cli.atomic import writing
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import comparable
from sleb_cli.events import Notice, Notify, Warned, ignore
from sleb_cli.records import differences
from sleb_cli.units import plural
from sleb_plugins.errors import OutputError, PlanError

# A crash of the program loses nothing; a crash of the machine loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

# Raise it when the same document would mean something else.
FORMAT = 2

Name = tuple[tuple[int, ...], int | None, int | None]
"""The removed blocks, the candidate, and the batch of a measurement."""

Measurement = tuple[Name, list[float]]
"""Its name, and the score of each sequence."""


def recorded_settings(journal: Path) -> dict[str, Any]:
    """Read the data type and the batch size of the search in a journal, if there is one."""
    try:
        with journal.open("rb") as file:
            search = json.loads(file.readline())
        return {"dtype": search["dtype"], "batch_size": search["search"]["batch_size"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # opening it to continue says more


def delete_journal(path: Path, notify: Notify) -> None:
    """Delete a journal once the plan is written; warn if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        notify(Warned(f"{path} is no longer needed, but cannot be deleted: {error.strerror}."))


class Journal:
    """Scores measured so far, by removed blocks, candidate and batch.

    The order of removed blocks has no meaning. If a metric scores `whole_models`, neither does
    which block is the candidate: 3 after 5 and 5 after 3 are the same model. Measurements are in
    memory until a file is opened for them. The main process writes the file, and all know its
    content. `require_valid` raises if a measurement about to be recorded is not of the model that
    it names.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        whole_models: bool = False,
        require_valid: Callable[[], object] = lambda: None,
    ) -> None:
        self.group = group or ProcessGroup()
        self._whole_models = whole_models
        self._require_valid = require_valid
        self._known: dict[Name, list[float]] = {}
        self._new: list[Measurement] = []
        self._path = Path()
        self._file: BinaryIO | None = None
        self._synced = 0.0

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
        scores = []
        for batch in batches:
            scores += self.find(removed, block, batch) or []
        return scores

    def add(
        self,
        scores: Sequence[float],
        removed: Sequence[int],
        block: int | None = None,
        batch: int | None = None,
    ) -> None:
        """Record a measurement; if not finite, it is null in the file and infinite when read."""
        self._new.append(((tuple(removed), block, batch), list(scores)))
        self._record(scores, removed, block, batch)

    def exchange(self) -> list[list[Measurement]]:
        """Record all processes' measurements since the last exchange, and return them by rank."""
        measured = self.group.gather(self._new)
        self._new = []
        for rank, theirs in enumerate(measured):
            if rank != self.group.rank:
                for name, scores in theirs:
                    self._record(scores, *name)
        return measured

    def forget(self) -> None:
        """Drop all measurements, because they turned out to be worthless."""
        self._known.clear()

    def open(self, path: Path, search: Mapping[str, Any], *, resume: bool) -> None:
        """Write to this file from now on; with `resume`, go on after what it holds."""
        if path.is_symlink():
            raise OutputError(
                f"{path} is a link, not a journal.",
                hint="Remove it, or choose another plan with -o.",
            )
        with writing(path):
            file = path.open("a+b")
        try:
            whole = 0
            if resume:
                with writing(path):
                    file.seek(0)
                    content = file.read()
                whole = self._read(content, path, search)
            with writing(path):
                file.truncate(whole)
        except BaseException:
            file.close()
            raise
        self._path = path
        self._file = file
        if whole == 0:
            self._append(search)
            self.sync()

    def know_alike(self) -> None:
        """Let all processes know what the main one has read."""
        self._known = self.group.from_main(lambda: self._known)

    def sync(self) -> None:
        """Flush the journal to disk."""
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; delete it if it has no measurement."""
        if self._file is not None:
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
            gone = sorted([*removed, block])
            block = gone.pop()
        return tuple(gone), block, batch

    def _read(self, content: bytes, path: Path, search: Mapping[str, Any]) -> int:
        """Read the measurements up to the first damaged line; return the length of what is read."""
        if not content:
            return 0
        header, *lines = content.splitlines(keepends=True)
        _check_header(header, path, search)
        whole = len(header)
        for line in lines:
            measurement = _parse_measurement(line)
            if measurement is None:
                break
            name, scores = measurement
            self._known[self._key(*name)] = scores
            whole += len(line)
        return whole

    def _append(self, document: Mapping[str, Any]) -> None:
        if self._file is not None:
            # In one write, so that a crash leaves at most an incomplete last line.
            text = json.dumps(document, separators=(",", ":"), allow_nan=False)
            with writing(self._path):
                self._file.write(f"{text}\n".encode())
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
        OutputError: the file cannot be written.
        PlanError: the file is no journal, or belongs to another search or version of sleb.
    """
    journal = Journal(**options)
    if journal.group.is_main:
        journal.open(path, {"format": FORMAT, **search}, resume=resume)
    journal.know_alike()
    if journal.is_saved:
        notify(Notice(f"Continuing with the {plural(len(journal), 'measurement')} in {path}."))
    try:
        yield journal
    except BaseException:
        if journal.is_saved:
            notify(Notice(f"All measurements are kept in {path}: rerun with --resume to continue."))
        raise
    finally:
        journal.close()


def _check_header(line: bytes, path: Path, search: Mapping[str, Any]) -> None:
    """Check that a journal's first line is of this search."""
    try:
        begun = json.loads(line)
    except ValueError:
        begun = None
    if not isinstance(begun, dict) or not line.endswith(b"\n"):
        raise PlanError(
            f"{path} is not a sleb journal, or its first line is damaged.",
            hint="Delete it, or start over with --force.",
        )
    if begun.get("format") != search["format"]:
        raise PlanError(
            f"Another version of sleb began the search in {path}.",
            hint="Finish it with that version, or start over with --force.",
        )
    differing = differences(search, begun)
    if differing:
        raise PlanError(
            f"{path} belongs to another search (now {differing}).",
            hint="Use the same model, data, metric and settings, or start over with --force.",
        )


def _parse_measurement(line: bytes) -> Measurement | None:
    """Read a line, if it is whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        document = json.loads(line)
        name = (tuple(document["removed"]), document["block"], document["batch"])
        scores = [math.inf if score is None else score for score in document["scores"]]
    except (ValueError, LookupError, TypeError):
        return None
    return name, scores
