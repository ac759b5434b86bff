"""Whether memory suffices, and what to do when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    return shortage(needed, free_bytes(device) if whole else free_bytes_per_process(device), of)


def shortage(needed: int, free: int, of: str) -> str | None:
    """Return a clause on the bytes needed and free, or None if there are enough."""
    return (
        None
        if needed <= free
        else f"{format_bytes(needed)} of {of}, but only {format_bytes(free)} is free"
    )


class SmallerPieces(Generic[S]):
    """Repeat work in smaller pieces for as long as it runs out of memory.

        for size in (pieces := SmallerPieces(8, lambda size: size // 2 or None, print)):
            with pieces:
                work(size)

    `smaller` returns the next size, or None after the smallest, whose error is raised; `notify` is
    called with each new size, before the work is repeated.
    """

    def __init__(
        self, size: S, smaller: Callable[[S], S | None], notify: Callable[[S], object]
    ) -> None:
        self._size, self._smaller, self._notify = size, smaller, notify
        self._failed = False

    def __iter__(self) -> Iterator[S]:
        yield self._size
        while self._failed:
            self._failed = False
            self._notify(self._size)
            free_memory()  # only here is the error gone, and with it the tensors of its frames
            yield self._size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        smaller = (
            self._smaller(self._size) if error is not None and is_out_of_memory(error) else None
        )
        if smaller is not None:
            self._size, self._failed = smaller, True
        return self._failed


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

    results: list[T] = []
    for pieces in (halving := SmallerPieces(size, lambda pieces: pieces // 2 or None, report)):
        with halving:
            results.append(run(pieces))
    return results[0]
