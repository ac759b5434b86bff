"""Communication and shutdown of the processes that a launcher started together.

Objects go through `torch.distributed`. If a process ends, the exchanges of the others
fail, and the launcher stops them. A process that fails says why in the launcher's key-value store,
for the main one to say.
"""

from __future__ import annotations

import json
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_cli.processes import WorkerFinished, local_rank, process_count, process_rank
from sleb_plugins import MachineError, SlebError, errors

T = TypeVar("T")

# A process that ends is noticed at once, so this only bounds a step that hangs.
MAX_STEP = timedelta(hours=24)
STARTING_TIME = timedelta(minutes=10)

_FAILURE = "sleb/failure"

Turn = list[list[T]]
"""The items of each process in one turn, after which they exchange results."""


def deal(items: Sequence[T], processes: int) -> list[Turn[T]]:
    """Deal one item to each process, turn after turn; each item always goes to the same process."""
    turns = []
    for first in range(0, len(items), processes):
        turn = [list(items[number : number + 1]) for number in range(first, first + processes)]
        turns.append(turn)
    return turns


def join_dealt(shares: Sequence[Sequence[T]]) -> list[T]:
    """Return the items of shares that were dealt as `items[rank::size]`, in their order."""
    size = len(shares)
    count = sum(map(len, shares))
    return [shares[number % size][number // size] for number in range(count)]


class PeerLost(Exception):
    """Another process has ended."""


class ProcessGroup:
    """Communication between the processes, which all call the same methods in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints for all."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes, in the order of their ranks."""
        items = [item] * self.size
        self._exchange("all_gather_object", items, item)
        return items

    def from_main(self, compute: Callable[[], T]) -> T:
        """Return the result of `compute` in the main process; the others wait for it."""
        boxed: list[Any] = [None]
        if self.is_main:
            boxed = [compute()]
        self._exchange("broadcast_object_list", boxed)
        received: T = boxed[0]
        return received

    def _exchange(self, collective: str, *arguments: Any) -> None:
        if self.size > 1:
            import torch.distributed as dist

            try:
                getattr(dist, collective)(*arguments)
            except RuntimeError as error:
                raise PeerLost from error

    def gather_in_order(self, items: Iterable[T]) -> Iterator[T]:
        """Yield every process's items, rank by rank."""
        mine = []
        for item in items:
            mine.append(item)
            if self.is_main:
                yield item
        for rank, gathered in enumerate(self.gather(mine)):
            if rank or not self.is_main:  # the main process has yielded its own
                yield from gathered

    def main_first(self, do: Callable[[], T]) -> T:
        """Call `do` in one process of each machine first; the others find its work in the cache."""
        if local_rank() == 0:
            result = do()
            self.gather(None)
        else:
            self.gather(None)
            result = do()
        return result


@contextmanager
def join_processes() -> Iterator[ProcessGroup]:
    """Yield the processes that a launcher started, or this one alone; if one fails, all end.

    Raises:
        WorkerFinished: the body failed in another process than the main one, which reports it.
        MachineError: another process died.
    """
    if process_count() == 1:
        yield ProcessGroup()
        return
    import torch.distributed as dist

    group = ProcessGroup(process_rank(), process_count())
    store = _connect(group)
    try:
        yield group
    except WorkerFinished:
        raise
    except BaseException as error:
        ended = _error_to_raise(error, group, store)
        if ended is error:
            raise
        raise ended from None
    finally:
        dist.destroy_process_group()


def _connect(group: ProcessGroup) -> Any:
    """Connect this process to the others; return the key-value store of all."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    hint = "Start them with `torchrun` or `accelerate launch`; for one alone, unset WORLD_SIZE."
    refused = error_saying(MachineError, "This process cannot connect to the others", hint)
    with translate_errors(refused), _default_signal_handlers():
        store, _, _ = next(iter(rendezvous("env://", timeout=STARTING_TIME)))
        dist.init_process_group(
            _backends(), store=store, rank=group.rank, world_size=group.size, timeout=MAX_STEP
        )
    return store


@contextmanager
def _default_signal_handlers() -> Iterator[None]:
    """Let signals end this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # torch waits without hearing Python's handlers, and there is nothing to clean up.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)
    terminated = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, terminated)


def _error_to_raise(error: BaseException, group: ProcessGroup, store: Any) -> BaseException:
    """Return the error to end with: the cause in the main process; the others end quietly."""
    if threading.current_thread() is threading.main_thread():
        # The launcher sends SIGTERM while this process says why it ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_cause = isinstance(error, Exception) and not isinstance(error, PeerLost)
    if not group.is_main:
        if is_cause:
            _tell_main(error, group, store)
        return WorkerFinished(1) if isinstance(error, Exception) else error
    if is_cause:
        return error
    failure = _failure_of_another(store)
    if failure is not None:
        return failure
    if isinstance(error, PeerLost | SystemExit):
        return MachineError(
            f"One of the {group.size} processes has died or was stopped.",
            hint="Memory may have run out. Run the command again (a search with --resume): nothing "
            "is measured again.",
        )
    return error


def _tell_main(error: BaseException, group: ProcessGroup, store: Any) -> None:
    """Leave the error of this process in the store."""
    failure = {"traceback": "".join(traceback.format_exception(error))}
    if isinstance(error, SlebError):
        failure = {
            "class": type(error).__name__,
            "message": f"In process {group.rank} of {group.size}: {error.message}",
            "hint": error.hint,
        }
    with suppress(RuntimeError):  # the store is gone, and with it the process that kept it
        store.set(_FAILURE, json.dumps(failure))


def _failure_of_another(store: Any) -> Exception | None:
    """Return the error that another process has left in the store."""
    with suppress(RuntimeError):
        if store.check([_FAILURE]):
            failure: Mapping[str, str] = json.loads(store.get(_FAILURE))
            if "traceback" in failure:  # a bug, which this process raises as the other would
                return RuntimeError(failure["traceback"])
            error_class = getattr(errors, failure["class"], SlebError)
            error: SlebError = error_class(failure["message"], hint=failure["hint"])
            return error
    return None


def _backends() -> str:
    import torch
    import torch.distributed as dist

    known = dist.Backend.default_device_backend_map
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if gpu is None or gpu.type not in known:
        return "gloo"
    return f"cpu:gloo,{gpu.type}:{known[gpu.type]}"
