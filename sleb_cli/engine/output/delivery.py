"""How a checkpoint or GGUF file is delivered: written aside, proven, and moved to its place; whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sleb_cli.atomic import writing
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.recovery.run import Recovered, Recovery
from sleb_cli.events import Notify
from sleb_plugins import OutputError, ProofError


@dataclass(frozen=True)
class Delivery:
    """Where a checkpoint or GGUF file goes, and what happens on the way.

    Attributes:
        place: the folder or file.
        replace: whether it may replace another one.
        verify: whether it is proven.
        keep_failed: where to keep it if its proof fails; None for nowhere.
        recovery: how its blocks are recovered; None if they are not.
    """

    place: Path
    replace: bool = False
    verify: bool = True
    keep_failed: Path | None = None
    recovery: Recovery | None = None


P = TypeVar("P")
R_co = TypeVar("R_co", covariant=True)


class Artifact(Protocol[P, R_co]):
    """A checkpoint or a GGUF file."""

    to: Delivery

    @property
    def watch(self) -> Watch:
        """The files that it is made of, which must not change meanwhile."""

    def claim(self) -> AbstractContextManager[Path]:
        """Claim its place, and yield one aside to write to."""

    def require_room(self) -> None:
        """Check that the disk has room for it as it is without recovery."""

    def write(self, aside: Path, recovered: Recovered | None, notify: Notify) -> None:
        """Write it."""

    def prove(self, aside: Path, recovered: Recovered | None, notify: Notify) -> P:
        """Prove it."""

    def finish(self, aside: Path, recovered: Recovered | None, proof: P | None, notify: Notify) -> R_co:
        """Add what comes with it, and return its record."""


def deliver(artifact: Artifact[P, R_co], notify: Notify) -> R_co:
    """Recover, write and prove a checkpoint or GGUF file.

    Raises:
        ProofError: it does not compute the same as the model in memory.
        OutputError: the place is taken, or cannot be written.
    """
    to, recovery = artifact.to, artifact.to.recovery
    with ExitStack() as stack:
        if recovery:
            stack.enter_context(recovery.state.told_on_failure(notify))
        # The place is claimed before hours of recovery, so that nobody else writes there, nor heals in the same state.
        aside = stack.enter_context(artifact.claim())
        stack.enter_context(artifact.watch.unchanged())
        artifact.require_room()
        recovered = recovery.run() if recovery else None
        artifact.write(aside, recovered, notify)
        proof = None
        if to.verify:
            with _kept_if_it_fails(aside, to.keep_failed):
                proof = artifact.prove(aside, recovered, notify)
        result = artifact.finish(aside, recovered, proof, notify)
    if recovery:
        recovery.state.delete()
    return result


@contextmanager
def _kept_if_it_fails(written: Path, place: Path | None) -> Iterator[None]:
    """Move what was written to the folder `place`, if there is one, should its proof fail meanwhile.

    Raises:
        ProofError: the proof failed; the hint says where the evidence is.
        OutputError: it cannot be moved.
    """
    try:
        yield
    except ProofError as error:
        if place is None:
            raise
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if written.is_file():
                place.mkdir()
            shutil.move(written, place)
        raise ProofError(
            error.message, hint=f"What was written is in {place}. Do not use it; please report the model."
        ) from error


def require_nothing_kept(place: Path | None) -> None:
    """Check that the folder for what fails its proof is new.

    Raises:
        OutputError: it exists.
    """
    if place is not None and place.exists():
        raise OutputError(f"{place} already exists.", hint="Choose another folder with --keep-failed.")
