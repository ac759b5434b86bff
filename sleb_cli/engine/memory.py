"""Whether memory suffices, and what to do when it runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from sleb_cli.engine.device import CPU, free_bytes, free_bytes_per_process, free_memory
from sleb_cli.events import Notice, Notify, ignore
from sleb_cli.units import format_bytes
from sleb_plugins.errors import is_out_of_memory

T = TypeVar("T")
S = TypeVar("S")


def memory_shortage(
    needed: int, device: torch.device, of: str = "memory", *, whole: bool = False
) -> str | None:
    """Return a clause on the memory needed and free, or None if there is enough."""
    # Processes share the memory of a machine: `whole` is for work that only one of them does.
    free = free_bytes(device) if whole else free_bytes_per_process(device)
    return shortage(needed, free, of)


def shortage(needed: int, free: int, of: str) -> str | None:
    """Return a clause on the bytes needed and free, or None if there are enough."""
    if needed <= free:
        return None
    return f"{format_bytes(needed)} of {of}, but only {format_bytes(free)} is free"


class SmallerPieces(Generic[S]):
    """Repeat work in smaller pieces for as long as it runs out of memory.

        pieces = SmallerPieces(8, lambda size: size // 2 or None, print)
        for size in pieces:
            with pieces:
                work(size)

    `smaller` returns the next size, or None after the smallest, whose error is raised; `notify` is
    called with each new size, before the work is repeated.
    """

    def __init__(
        self, size: S, smaller: Callable[[S], S | None], notify: Callable[[S], object]
    ) -> None:
        self._size = size
        self._smaller = smaller
        self._notify = notify
        self._begun = False
        self._failed = False

    def __iter__(self) -> SmallerPieces[S]:
        return self

    def __next__(self) -> S:
        if not self._begun:
            self._begun = True
            return self._size
        if not self._failed:
            raise StopIteration
        self._failed = False
        self._notify(self._size)
        free_memory()  # only here is the error gone, and with it the tensors of its frames
        return self._size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        smaller = self._smaller(self._size)
        if smaller is None:
            return False
        self._size = smaller
        self._failed = True
        return True


def in_smaller_pieces(
    run: Callable[[int], T],
    size: int,
    device: torch.device = CPU,
    notify: Notify = ignore,
    doing: str = "",
) -> T:
    """Call `run` with this size, halved as often as memory runs out, and return its result.

    `doing` completes the notice: "fitting {} sequences".
    """

    def report(smaller: int) -> None:
        notify(Notice(f"Out of memory on {device}; {doing.format(smaller)} at a time."))

    pieces = SmallerPieces(size, lambda size: size // 2 or None, report)
    for smaller in pieces:
        with pieces:
            result = run(smaller)
    return result
