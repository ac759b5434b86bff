"""The program `sleb`, imported once and forked for each run, so that thousands of runs take
minutes.

A run is a process of its own, as if typed into a shell: it can be killed, limited, and made to meet
faults of the disk.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HERE = Path(__file__).parent
LIBRARY = "SLEB_TESTS_FAULTY_IO"


class Calls(IntFlag):
    """Kinds of calls to the file system, as faulty_io.c counts them."""

    OPEN_READ, OPEN_WRITE, READ, WRITE, SYNC, RENAME, MAKE, REMOVE = (1 << bit for bit in range(8))
    READS = OPEN_READ | READ
    CHANGES = OPEN_WRITE | WRITE | SYNC | RENAME | MAKE | REMOVE
    ALL = READS | CHANGES


KILL, STOP = -1, -2


@dataclass(frozen=True)
class Fault:
    """What the `at`-th call of these kinds below `folder` meets: an errno, KILL or STOP.

    With `lasting`, each later call meets it too. At 0, calls are only counted.
    """

    folder: Path
    at: int = 0
    what: int = 0
    calls: Calls = Calls.ALL
    lasting: bool = False


class Call(NamedTuple):
    """A call to the file system: its sort, the function of libc, and the path below the folder of
    the Fault.
    """

    sort: Calls
    name: str
    path: str


@dataclass(frozen=True)
class Finished:
    """How a run ended.

    `exit_code` is negative for a signal, None if it took too long; `calls` are what a Fault saw.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    calls: tuple[Call, ...]


def wrong_ending(code: int | None, said: str, codes: Collection[int]) -> list[str]:
    """List what is wrong with how a run ended: its exit code, a traceback, or no sentence and hint
    for an error.
    """
    wrong = []
    if code not in codes:
        wrong.append(f"exit code {code}, not one of {codes}")
    if "Traceback" in said:
        wrong.append("a traceback")
    errors = re.findall(r"^error: \S", said, re.MULTILINE)
    with_hints = re.findall(r"^error: \S.*\nhint: \S.*\n\Z", said, re.MULTILINE)
    expected = 1 if code in range(1, 10) else 0
    if not len(errors) == len(with_hints) == expected:
        wrong.append("not one sentence and a hint")
    return wrong


def require(ended: Any, codes: Collection[int] = (0,)) -> Any:
    """Require that a run, in this process or another, ended well."""
    wrong = wrong_ending(ended.exit_code, ended.stderr, codes)
    assert not wrong, f"{wrong}: {ended.stderr[-3000:]}"
    return ended


class Running:
    """A run that goes on."""

    def __init__(self, process: Any, place: Path, seconds: float) -> None:
        self._process, self._place, self._seconds = process, place, seconds

    def ends_within(self, seconds: float) -> bool:
        """Wait for this long; return whether it has ended."""
        self._process.join(seconds)
        return not self._process.is_alive()

    def wait_until_stopped(self) -> None:
        """Wait until it meets STOP."""
        state = Path(f"/proc/{self._process.pid}/stat")
        while not self.ends_within(0.001):
            if state.read_text().rpartition(")")[2].split()[0] == "T":
                return
        raise AssertionError(f"it ended before it was stopped: {self.written('stderr')}")

    def send(self, *numbers: int) -> None:
        """Send signals."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def written(self, name: str) -> str:
        """What it has written to this stream so far."""
        path = self._place / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self) -> Finished:
        """Wait for its end; one that takes longer than its limit is killed."""
        code = None
        if self.ends_within(self._seconds):
            code = self._process.exitcode
        else:
            self._process.kill()
            self._process.join()
        calls = []
        for line in self.written("calls").splitlines():
            sort, name, path = line.split(" ", 2)
            calls.append(Call(Calls(int(sort)), name, path))
        return Finished(code, self.written("stdout"), self.written("stderr"), tuple(calls))

    def when_stopped(self, do: Callable[[], object]) -> Finished:
        """Do something when it has met STOP, let it go on, and wait for its end."""
        self.wait_until_stopped()
        do()
        self.send(signal.SIGCONT)
        return self.wait()


class Program:
    """Starts runs. `scratch` is a folder for their output."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        library = scratch / "faulty_io.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faulty_io.c", "-ldl"],
            check=True,
        )
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "faults.arrangements"])
        # The server of Python 3.11 does not set sys.path before it imports what is to be imported
        # once.
        path = os.pathsep.join(filter(None, sys.path))
        ours = {"LD_PRELOAD": str(library), LIBRARY: str(library), "PYTHONPATH": path}
        with mock.patch.dict(os.environ, ours):
            multiprocessing.forkserver.ensure_running()

    def start(
        self,
        *words,
        cwd,
        environment=None,
        fault=None,
        before=None,
        memory=None,
        processor=None,
        seconds=120,
    ):
        """Start `sleb` with these words.

        Args:
            words: the command.
            cwd: where it runs.
            environment: is added to that of the test; None removes a variable.
            fault: what a call to the file system meets.
            before: a function, and its arguments, that is called in the process before the program.
            memory: its limit in bytes, beyond what the program itself maps.
            processor: its limit in seconds of a processor.
            seconds: its limit by the clock.
        """
        place = Path(tempfile.mkdtemp(dir=self._scratch))
        typed = tuple(map(str, words))
        variables = {}
        for name, value in {**os.environ, **(environment or {})}.items():
            if value is not None:
                variables[name] = str(value)
        process = self._context.Process(
            target=_run, args=(typed, place, cwd, variables, fault, before, memory, processor)
        )
        process.start()
        return Running(process, place, seconds)

    def run(self, *words: object, codes: Collection[int] | None = (0,), **options: Any) -> Finished:
        """Run `sleb` to its end, which must be one of these exit codes, with a sentence if it is an
        error.
        """
        finished = self.start(*words, **options).wait()
        return finished if codes is None else require(finished, codes)

    def launch(self, count, *words, fault=None, environment=None, **options) -> list[Running]:
        """Start `sleb` in so many processes, as a launcher does; the first one meets the fault."""
        with socket.create_server(("localhost", 0)) as place:
            port = place.getsockname()[1]
        running = []
        for rank in range(count):
            variables = dict(environment or {})
            if count > 1:
                variables["MASTER_ADDR"] = "localhost"
                variables["MASTER_PORT"] = port
                variables["WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] = count
                variables["RANK"] = variables["LOCAL_RANK"] = rank
            met = fault if rank == 0 else None
            running.append(self.start(*words, environment=variables, fault=met, **options))
        return running


def _run(words, place, cwd, variables, fault, before, memory, processor) -> None:
    """Be the program, in a session of its own; never returns."""
    # The tests may run under nohup, or in the background.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # chosen anew
    os.chdir(cwd)
    sys.argv = ["sleb", *words]
    if memory is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory,) * 2)
    if processor is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
    code: Any = 1
    try:
        if fault is not None:
            _arrange(fault, place)
        if before is not None:
            before[0](*before[1:])
        importlib.import_module("sleb_cli.__main__").run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def _arrange(fault: Fault, place: Path) -> None:
    trace = -1
    if fault.at == 0:
        trace = os.open(place / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    folder = os.fsencode(fault.folder.resolve())
    at = ctypes.c_long(fault.at)
    library = ctypes.CDLL(_LIBRARY)
    library.faulty_io(folder, int(fault.calls), at, fault.what, int(fault.lasting), trace)


_LIBRARY = os.environ.get(LIBRARY, "")


def _import_everything() -> None:
    """Import the program and what its commands import, once."""
    import sleb_cli
    import sleb_plugins

    for package in (sleb_cli, sleb_plugins):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name.endswith(("lm_eval_internals", "lm_eval_model")):
                continue  # lm-eval starts a thread
            with contextlib.suppress(ImportError):  # what needs an optional package
                importlib.import_module(module.name)
    importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    for name in ("llama", "gpt2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    # No run has to look through all of this again when it collects garbage.
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, (
        "importing the program started threads, which a fork would lose"
    )


if _LIBRARY:  # in the server
    _import_everything()
