"""The processes that a launcher started together: what they tell each other, and how they end together.

Objects and tensors go through `torch.distributed`. Beside it, each process watches a *board*, a key-value store of
torch's, so that it learns within moments that another one has failed, whatever it is doing.
"""

from __future__ import annotations

import _thread
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from sleb_cli.engine.third_party import translate_errors
from sleb_cli.processes import WorkerFinished, local_rank, process_count, process_rank
from sleb_plugins import MachineError, SlebError

T = TypeVar("T")

# No step takes longer; a process that fails is noticed at once.
LONGEST_STEP = timedelta(hours=24)
# How long a process that is alive takes to answer, even if the machine is busy.
ROLL_CALL_SECONDS = 3.0
POLL_SECONDS = 0.0005
STARTING_TIME = timedelta(minutes=10)

_RERUN = "Rerun the command, a search or a healing with --resume: nothing is measured again."

Turn = list[list[T]]
"""What each process does before they exchange what they found."""


def deal(items: Sequence[T], processes: int) -> Iterator[Turn[T]]:
    """Deal one item to each process, turn after turn; the same items always go to the same processes."""
    for first in range(0, len(items), processes):
        dealt = [[item] for item in items[first : first + processes]]
        yield [*dealt, *([] for _ in range(processes - len(dealt)))]


class PeerLost(Exception):
    """The connection to another process broke, or another process has failed."""


class ProcessGroup:
    """Communication between the processes. All of them must call the same methods in the same order.

    Alone, a process exchanges nothing, and `torch.distributed` is not needed.
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self.sent_bytes = 0
        """How many bytes of objects this process has sent."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints for all."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes, in the order of their ranks."""
        return [item]

    def from_main(self, compute: Callable[[], T]) -> T:
        """Return what the main process computes; the others wait for it."""
        return compute()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors."""
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Return the tensor of one process, by default the main one; those of the others are overwritten."""
        return tensor

    def in_turn(self, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Yield the items of all processes, each with its process's rank, in the order of ranks.

        The main process has its own as they come, and nobody has those of the others before all are done.
        """
        own = []
        for item in items:
            own.append(item)
            if self.is_main:
                yield 0, item
        for rank, found in enumerate(self.gather(own)):
            if rank or not self.is_main:
                yield from ((rank, item) for item in found)

    def one_first(self, do: Callable[[], T]) -> T:
        """Call `do` in one process of each machine before the others, which find in the cache what it put there."""
        if local_rank():
            self.gather(None)
            return do()
        found = do()
        self.gather(None)
        return found


class _Launched(ProcessGroup):
    """Several processes. Objects go through the CPU, whatever device the tensors are on."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = process_rank(), process_count()
        with translate_errors(_cannot_connect):
            self._board = _Board(self.rank, self.size)
            dist.init_process_group(
                _backends(), store=self._board.store, rank=self.rank, world_size=self.size, timeout=LONGEST_STEP
            )

    def gather(self, item: T) -> list[T]:
        own, sizes = self._pickled(item)
        padded = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
        self._run(dist.all_gather, padded, _padded(own, max(sizes)))
        return [_unpickled(found, size) for found, size in zip(padded, sizes, strict=True)]

    def from_main(self, compute: Callable[[], T]) -> T:
        if not self.is_main:
            size = torch.empty(1, dtype=torch.int64)
            self._run(dist.broadcast, size, 0)
            content = torch.empty(int(size), dtype=torch.uint8)
            self._run(dist.broadcast, content, 0)
            received: T = _unpickled(content, len(content))
            return received
        found = compute()
        content = _as_bytes(found)
        self._run(dist.broadcast, torch.tensor([len(content)]), 0)
        self._run(dist.broadcast, content, 0)
        self.sent_bytes += len(content)
        return found

    def mean(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        self._run(dist.all_reduce, total)
        return total / self.size

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        self._run(dist.broadcast, tensor, source)
        return tensor

    def _pickled(self, item: Any) -> tuple[Tensor, list[int]]:
        """Return an object as bytes, and the sizes of those of all processes."""
        own = _as_bytes(item)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._run(dist.all_gather, sizes, torch.tensor([len(own)]))
        self.sent_bytes += len(own)
        return own, [int(size) for size in sizes]

    def _run(self, collective: Callable[..., Any], *arguments: Any) -> None:
        """Run a collective operation, and wait for it in a way that leaves room for signals and failures.

        Raises:
            PeerLost: another process has failed.
        """
        try:
            work = collective(*arguments, async_op=True)
            while not work.is_completed():
                if self._board.is_over.is_set():
                    raise PeerLost
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise PeerLost from error

    def end_with(self, error: BaseException) -> BaseException:
        """Have all processes end, and return what this one ends with: the main one with the cause."""
        try:
            self._board.post(error)
            if self.is_main:
                return self._cause(error)
        except RuntimeError:  # the store is gone, and with it whoever kept it
            if self.is_main and isinstance(error, PeerLost | SystemExit):
                return MachineError("The connection to the other processes broke.", hint=_RERUN)
        if self.is_main or not isinstance(error, Exception):
            return error
        return WorkerFinished(1)

    def _cause(self, error: BaseException) -> BaseException:
        """Return why all processes end: an error of this one, that of another, or the death of another."""
        if _explains(error):
            return error
        rank, posted = self._board.failure()
        if _explains(posted):
            return _named(posted, rank, self.size)
        if lost := self._board.missing():
            which = " and ".join(map(str, lost))
            what = f"Process {which} of {self.size} has" if len(lost) == 1 else f"Processes {which} of {self.size} have"
            return MachineError(f"{what} died.", hint=f"Memory may have run out. {_RERUN}")
        return posted if isinstance(error, PeerLost) and error.__cause__ is None else error.__cause__ or error

    def close(self) -> None:
        """Leave the group."""
        self._board.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def join_processes() -> Iterator[ProcessGroup]:
    """Yield the processes that a launcher started together with this one, or this one alone.

    If one fails or dies, all end: the others are stopped like by a request to terminate.

    Raises:
        WorkerFinished: the body failed in another process than the main one, which says so.
        MachineError: another process died.
    """
    if process_count() == 1:
        yield ProcessGroup()
        return
    group = _Launched()
    try:
        yield group
    except WorkerFinished:
        raise
    except BaseException as error:
        ended = _uninterrupted(group, error)
        if ended is error:
            raise
        raise ended from None
    finally:
        group.close()


def _uninterrupted(group: _Launched, error: BaseException) -> BaseException:
    try:
        return group.end_with(error)
    except SystemExit:  # what another process failed with came while this one was ending by itself
        return group.end_with(error)


class _Board:
    """Where processes say that they have failed, and answer whether they are alive.

    A thread waits for such news and interrupts what this process is doing. The store is that of the launcher, or where
    it has none, of the main process.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.store = next(iter(rendezvous("env://", timeout=STARTING_TIME)))[0]
        self._client, self._watched = _connect(), _connect()
        self.is_over = threading.Event()
        self._is_closing = False
        self._dead: list[int] = []
        self._wait_for_all()
        self._thread = threading.Thread(target=self._watch, name="sleb-processes", daemon=True)
        self._thread.start()

    def _wait_for_all(self) -> None:
        """Wait for all processes here, where signals are heard, and not inside of torch."""
        self._client.set(f"started/{self._rank}", "")
        deadline = time.monotonic() + STARTING_TIME.total_seconds()
        while not self._client.check([f"started/{rank}" for rank in range(self._size)]):
            if time.monotonic() > deadline:
                raise MachineError(
                    f"Not all {self._size} processes have started.", hint="Check the launcher's settings."
                )
            time.sleep(0.02)

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            self._watched.wait([f"over/{self._rank}"], timedelta(days=365))
        if self._is_closing:
            return
        with suppress(RuntimeError):
            self._watched.set(f"alive/{self._rank}", "")
        self.is_over.set()
        # The handler that `run` sets, if any; without it, the next exchange ends this process.
        _thread.interrupt_main(signal.SIGTERM)

    def post(self, error: BaseException) -> None:
        """Tell all processes to end; only the first error that is posted counts."""
        self._is_closing = True
        if self._client.add("failures", 1) == 1:
            self._client.set("failure", pickle.dumps((self._rank, _picklable(error))))  # type: ignore[arg-type]
        self._client.set(f"alive/{self._rank}", "")
        for rank in range(self._size):
            self._client.set(f"over/{rank}", "")

    def failure(self) -> tuple[int, BaseException]:
        """Return the rank of the process that failed first, and its error."""
        rank, error = pickle.loads(self._client.get("failure"))
        return rank, error

    def missing(self) -> list[int]:
        """Return the ranks of the processes that do not answer."""
        self._dead = self._without("alive", range(self._size))
        return self._dead

    def _without(self, key: str, ranks: Iterable[int]) -> list[int]:
        """Wait for a key of each of these processes, and return the ranks of those that do not set it."""
        deadline, missing = time.monotonic() + ROLL_CALL_SECONDS, list(ranks)
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._client.check([f"{key}/{rank}"])]
            time.sleep(0.02 if missing else 0)
        return missing

    def close(self) -> None:
        """End the thread; from now on, this process counts as alive. The main one may keep the store, so it is last."""
        self._is_closing = True
        with suppress(RuntimeError):
            self._client.set(f"alive/{self._rank}", "")
            self._client.set(f"over/{self._rank}", "")
            self._thread.join(1)
            self._client.set(f"left/{self._rank}", "")
            if self._rank == 0:
                self._without("left", set(range(self._size)) - set(self._dead))


def _cannot_connect(words: str) -> MachineError:
    return MachineError(
        f"This process cannot connect to the others: {words}.",
        hint="Start them with `torchrun` or `accelerate launch`; for one alone, unset WORLD_SIZE.",
    )


def _connect() -> Store:
    """Return a client of the store; each is for one thread."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore(f"sleb/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", client)


def _backends() -> str:
    """Return the backend of each kind of device on this machine."""
    known = dist.Backend.default_device_backend_map
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return f"cpu:gloo,{found.type}:{known[found.type]}" if found and found.type in known else "gloo"


def _explains(error: BaseException) -> bool:
    """Whether an error is the cause of an end, and not a consequence or a request."""
    return isinstance(error, Exception) and not isinstance(error, PeerLost)


def _named(error: BaseException, rank: int, size: int) -> BaseException:
    """Say in which process an error was raised."""
    if isinstance(error, SlebError):
        error.message = f"In process {rank} of {size}: {error.message}"
    return error


def _picklable(error: BaseException) -> BaseException:
    """Return the error, or one that says the same if it cannot be sent; one of ours needs no traceback."""
    if not isinstance(error, SlebError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _as_bytes(item: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)


def _padded(content: Tensor, size: int) -> Tensor:
    return torch.cat([content, content.new_zeros(size - len(content))])


def _unpickled(content: Tensor, size: int) -> Any:
    return pickle.loads(content[:size].numpy().tobytes())
