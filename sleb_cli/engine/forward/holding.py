"""Where the hidden states of a walk wait for the next block: where they were computed, in host memory, or in a file.

If blocks are streamed, a step needs the hidden states of all calibration sequences and of all branches at once, since
its weights are read once for all of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb_cli.atomic import writing
from sleb_cli.engine.forward.skipping import Call

Hold = Callable[[int, Tensor], Tensor]
"""Takes a branch and its hidden states, and returns them as they are held until the next block needs them."""

MOST_SHARED = 64
"""With more tensors than these, batches share too little for a search among them to pay."""

ENTERING = -2
"""The branch of what enters the first block."""


def in_place(branch: int, hidden: Tensor) -> Tensor:
    """Hold hidden states where they were computed."""
    return hidden


def in_host_memory(branch: int, hidden: Tensor) -> Tensor:
    """Hold hidden states in host memory, where an accelerator has too little."""
    return hidden.cpu()


HoldAny = Callable[[int, int, Tensor], Tensor]
"""The same for any of several walks, by its number."""


@dataclass(frozen=True)
class Holding:
    """Where the hidden states of several walks are held.

    Attributes:
        spill_to: the folder of a file for what does not fit into memory; None holds all in memory.
        slot_bytes: with a folder, the most bytes that the hidden states of one branch of one walk take.
        on_host: hold them in host memory, where the device has too little.
    """

    spill_to: Path | None = None
    slot_bytes: int = 0
    on_host: bool = False

    def open(self, slots: int) -> HoldAny:
        """Return how to hold at most `slots` branches, over all walks.

        Raises:
            OutputError: the disk has no room for them.
        """
        if self.spill_to is not None:
            return SpillFile(self.spill_to, slots, self.slot_bytes).hold
        place = in_host_memory if self.on_host else in_place
        return lambda walk, branch, hidden: place(branch, hidden)


def in_turns(hold: Hold, places: int) -> Hold:
    """Hold the states of a single branch in several places in turn, so that the last ones stay as they are."""
    turns = cycle(range(places))
    return lambda branch, hidden: hold(next(turns), hidden)


class SharedInputs:
    """What a model passes to its blocks beside hidden states, held once where it is the same for several batches."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def of(self, calls: Sequence[Call], hold: Hold) -> list[Call]:
        """Return the calls with tensors of earlier calls in place of equal ones, and with what enters held."""
        known: dict[int, Tensor] = {}
        entering = hold(ENTERING, calls[0].entering)  # every block is skipped when calls are recorded
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
        self._slots: dict[tuple[int, int], int] = {}
        room = writing(folder, hint="Free some space, raise --memory, or use fewer --samples.")
        with room, tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, slots * slot_bytes)
            self._memory = torch.frombuffer(mmap.mmap(file.fileno(), slots * slot_bytes), dtype=torch.uint8)

    def hold(self, walk: int, branch: int, hidden: Tensor) -> Tensor:
        """Hold the hidden states of a branch of a walk in the place of those that it had before."""
        slot = self._slots.setdefault((walk, branch), len(self._slots))
        part = self._memory[slot * self._slot_bytes :][: hidden.nbytes]
        held = part.view(hidden.dtype).view(hidden.shape)
        return held.copy_(hidden)
