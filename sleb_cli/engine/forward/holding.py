"""Where hidden states wait for the next block: where they were computed, in host memory, or in a file.

If blocks are streamed, a step needs the hidden states of all calibration sequences and of all branches at once, since
its weights are read once for all of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb_cli.atomic import writing
from sleb_cli.engine.forward.skipping import Call

Hold = Callable[[Hashable, Tensor], Tensor]
"""Takes a name and hidden states, and returns them as they wait; they replace those of the same name."""

MOST_SHARED = 64
"""With more tensors than these, batches share too little for a search among them to pay."""


def as_computed(name: Hashable, hidden: Tensor) -> Tensor:
    """Let hidden states wait where they were computed."""
    return hidden


@dataclass(frozen=True)
class Holding:
    """Where hidden states wait.

    Attributes:
        device: where; None for where they were computed.
        spill_to: the folder of a file for what does not fit into memory; None for memory.
        slot_bytes: with a folder, the most bytes that the hidden states of one name take.
    """

    device: torch.device | None = None
    spill_to: Path | None = None
    slot_bytes: int = 0

    def open(self, slots: int) -> Hold:
        """Return a function that holds hidden states under at most this many names.

        Raises:
            OutputError: the disk has no room for them.
        """
        if self.spill_to is not None:
            return SpillFile(self.spill_to, slots, self.slot_bytes).hold
        return as_computed if self.device is None else lambda name, hidden: hidden.to(self.device)


def in_rotation(hold: Hold, places: int) -> Hold:
    """Hold the states of one name in several places in turn, so that the last ones stay as they are."""
    place = cycle(range(places))
    return lambda name, hidden: hold((name, next(place)), hidden)


class SharedInputs:
    """What a model passes to its blocks with hidden states, held once where it is the same for several batches."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def of(self, calls: Sequence[Call], entering: Tensor) -> list[Call]:
        """Return calls that start from `entering`, with tensors of earlier calls in place of equal ones."""
        known: dict[int, Tensor] = {}
        return [
            replace(
                call,
                entering=entering,
                args=self._shared(call.args, known),
                kwargs=self._shared(call.kwargs, known),
            )
            for call in calls
        ]

    def _shared(self, value: Any, known: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = self._find(value)
            return known[id(value)]
        if type(value) in (tuple, list):
            return type(value)(self._shared(part, known) for part in value)
        if type(value) is dict:
            return {key: self._shared(part, known) for key, part in value.items()}
        return value

    def _find(self, value: Tensor) -> Tensor:
        for held in self._held:
            if held.shape == value.shape and held.dtype == value.dtype and torch.equal(held, value):
                return held
        if len(self._held) < MOST_SHARED:
            self._held.append(value)
        return value


class SpillFile:
    """Hidden states that do not fit into memory, in a file that is mapped into it: the system keeps what it can.

    The file has no name, so nothing is left of it, whatever ends the program. Its space is reserved at once.
    """

    def __init__(self, folder: Path, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._slots: dict[Hashable, int] = {}
        room = writing(folder, hint="Free some space, raise --memory, or use fewer --samples.")
        with room, tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, slots * slot_bytes)
            self._memory = torch.frombuffer(mmap.mmap(file.fileno(), slots * slot_bytes), dtype=torch.uint8)

    def hold(self, name: Hashable, hidden: Tensor) -> Tensor:
        """Copy hidden states into the place of those that had this name."""
        slot = self._slots.setdefault(name, len(self._slots))
        part = self._memory[slot * self._slot_bytes :][: hidden.nbytes]
        held = part.view(hidden.dtype).view(hidden.shape)
        return held.copy_(hidden)
