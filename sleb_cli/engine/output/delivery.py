"""How a checkpoint or GGUF file is delivered: written aside, proven, and moved to its place; whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.atomic import writing
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.events import Notify
from sleb_plugins import ProofError

if TYPE_CHECKING:
    from sleb_cli.engine.recovery.run import Recovery


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

    @contextmanager
    def claimed(self, claim: AbstractContextManager[Path], watch: Watch, notify: Notify) -> Iterator[Path]:
        """Yield a path aside to write to, which gets its place at the end if no watched file has changed meanwhile.

        The place is claimed before hours of recovery, so nobody else writes there, or heals in the same state.
        """
        told = self.recovery.state.told_on_failure(notify) if self.recovery else nullcontext()
        with told, claim as aside, watch.unchanged():
            yield aside
        if self.recovery:
            self.recovery.state.delete()

    @contextmanager
    def kept_if_it_fails(self, written: Path) -> Iterator[None]:
        """Keep what was written, if the user asked for that and its proof fails.

        Raises:
            ProofError: the proof failed; the hint says where the evidence is.
            OutputError: it cannot be moved.
        """
        try:
            yield
        except ProofError as error:
            if (place := self.keep_failed) is None:
                raise
            with writing(place, hint=f"The proof failed: {error.message} Choose another place with --keep-failed."):
                place.parent.mkdir(parents=True, exist_ok=True)
                if written.is_file():
                    place.mkdir()
                shutil.move(written, place)
            raise ProofError(
                error.message, hint=f"What was written is in {place}. Do not use it; please report the model."
            ) from error
