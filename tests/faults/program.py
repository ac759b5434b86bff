"""The program `sleb`, imported once and forked for each run, so that thousands of runs take minutes.

A run is a process of its own, as if typed into a shell: it can be killed, limited, and made to meet faults of the disk.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntFlag
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = "SLEB_TESTS_FAULTY_IO"
EVERYTHING_READY = "sleb_cli.__main__"


class Calls(IntFlag):
    """Kinds of calls to the file system, as faulty_io.c counts them."""

    OPEN_READ, OPEN_WRITE, READ, WRITE, SYNC, RENAME, MAKE, REMOVE = (1 << bit for bit in range(8))
    READS = OPEN_READ | READ
    CHANGES = OPEN_WRITE | WRITE | SYNC | RENAME | MAKE | REMOVE
    ALL = READS | CHANGES


KILL, SHORT, STOP = -1, -2, -3


@dataclass(frozen=True)
class Fault:
    """What the `at`-th call of these kinds below `folder` meets: an errno, KILL, SHORT or STOP.

    With `lasting`, each later call meets it too. At 0, calls are only counted.
    """

    folder: Path
    at: int = 0
    what: int = 0
    calls: Calls = Calls.ALL
    lasting: bool = False


@dataclass(frozen=True)
class Limits:
    """`memory` is in bytes of address space beyond what the program itself maps, `seconds` are of the clock."""

    memory: int | None = None
    seconds: float = 120
    processor_seconds: int | None = None
    file_size: int | None = None


@dataclass(frozen=True)
class Finished:
    """How a run ended; `exit_code` is negative for a signal. `calls` lists the calls that a `Fault` counted."""

    arguments: tuple[str, ...]
    exit_code: int | None
    stdout: str
    stderr: str
    calls: tuple[str, ...]
    seconds: float

    @property
    def was_killed(self) -> bool:
        """Whether it was ended by SIGKILL."""
        return self.exit_code == -signal.SIGKILL


class Running:
    """A run that goes on."""

    def __init__(self, process: Any, arguments: tuple[str, ...], place: Path, limits: Limits) -> None:
        self._process, self._arguments, self._place, self._limits = process, arguments, place, limits
        self._begun = time.monotonic()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return int(self._process.pid)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return bool(self._process.is_alive())

    def wait_until_stopped(self) -> bool:
        """Wait until it meets STOP; False if it ends before."""
        state = Path(f"/proc/{self.pid}/stat")
        while self.is_alive:
            with contextlib.suppress(OSError):
                if state.read_text().rpartition(")")[2].split()[0] == "T":
                    return True
            os.sched_yield()
        return False

    def ends_within(self, seconds: float) -> bool:
        """Wait for this long; return whether it has ended."""
        self._process.join(seconds)
        return not self.is_alive

    def send(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        path = self._place / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self) -> Finished:
        """Wait for its end; one that takes longer than its limit is killed, and its exit code is None."""
        self._process.join(self._limits.seconds)
        late = self._process.is_alive()
        if late:
            self._process.kill()
            self._process.join()
        code = None if late else self._process.exitcode
        texts = {}
        for name in ("stdout", "stderr", "calls"):
            path = self._place / name
            texts[name] = path.read_text(errors="replace") if path.exists() else ""
            path.unlink(missing_ok=True)
        self._place.rmdir()
        self._process.close()
        seconds = time.monotonic() - self._begun
        return Finished(
            self._arguments, code, texts["stdout"], texts["stderr"], tuple(texts["calls"].splitlines()), seconds
        )


class Program:
    """Starts runs. `scratch` is a folder for their output."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._library = scratch / "faulty_io.so"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", self._library, HERE / "faulty_io.c", "-ldl"]
        subprocess.run(command, check=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "PYTHONPATH", LIBRARY)}
        os.environ["LD_PRELOAD"] = os.environ[LIBRARY] = str(self._library)
        # The server of Python 3.11 does not set sys.path before it imports what is to be imported once.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        self._runs = 0

    def start(
        self,
        *arguments: object,
        cwd: Path,
        environment: Mapping[str, str | None] | None = None,
        fault: Fault | None = None,
        limits: Limits | None = None,
        clock_goes_back: int = 0,
    ) -> Running:
        """Start `sleb` with these arguments. `environment` is added to that of the test; None removes a variable.

        The clock of the day goes back by `clock_goes_back` seconds each time it is read.
        """
        self._runs += 1
        place = self._scratch / str(self._runs)
        place.mkdir()
        words = tuple(os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in arguments)
        variables = dict(os.environ) | {name: value for name, value in (environment or {}).items() if value is not None}
        for name in [name for name, value in (environment or {}).items() if value is None]:
            variables.pop(name, None)
        limits = limits or Limits()
        how = (words, place, cwd, variables, fault, limits, clock_goes_back)
        process = self._context.Process(target=_run, args=how)
        process.start()
        return Running(process, words, place, limits)

    def run(self, *arguments: object, cwd: Path, **options: Any) -> Finished:
        """Run `sleb` to its end."""
        return self.start(*arguments, cwd=cwd, **options).wait()

    def count(self, *arguments: object, cwd: Path, fault: Fault, **options: Any) -> Finished:
        """Run `sleb` undisturbed, and list the calls that the fault would count."""
        return self.run(*arguments, cwd=cwd, fault=replace(fault, at=0), **options)

    def call(self, function: Any, *arguments: Any, cwd: Path, **options: Any) -> Finished:
        """Call a function of a module in a run's process instead of the program; its result is printed as JSON."""
        return self.run(
            "call", json.dumps([function.__module__, function.__qualname__]), *arguments, cwd=cwd, **options
        )


def _run(
    words: tuple[str, ...],
    place: Path,
    cwd: Path,
    variables: dict[str, str],
    fault: Fault | None,
    limits: Limits,
    clock_goes_back: int,
) -> None:
    """Be the program, in a session of its own; never returns."""
    assert EVERYTHING_READY in sys.modules, "the server did not import the program before it forked"
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
    if limits.memory is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limits.memory,) * 2)
    if limits.processor_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limits.processor_seconds,) * 2)
    if limits.file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size,) * 2)
    library = ctypes.CDLL(variables.get(LIBRARY) or os.environ.get(LIBRARY) or _LIBRARY)
    library.faulty_clock(ctypes.c_long(clock_goes_back))
    if fault is not None:
        trace = os.open(place / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.at == 0 else -1
        library.faulty_io.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 1, ctypes.c_long, *[ctypes.c_int] * 3]
        folder = os.fsencode(fault.folder.resolve())
        library.faulty_io(folder, int(fault.calls), fault.at, fault.what, int(fault.lasting), trace)
    code: Any = 1
    try:
        if words[:1] == ("call",):
            module, name = json.loads(words[1])
            print(json.dumps(getattr(importlib.import_module(module), name)(*words[2:])))
            code = 0
        else:
            importlib.import_module("sleb_cli.__main__").run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


_LIBRARY = os.environ.get(LIBRARY, "")


def _import_everything() -> None:
    """Import the program and what its commands import, once."""

    import sleb_cli
    import sleb_plugins

    importlib.import_module("encodings.utf_8_sig")  # a user may not be allowed to read where Python lies
    for package in (sleb_cli, sleb_plugins):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            with contextlib.suppress(ImportError):  # what needs an optional package
                importlib.import_module(module.name)
    for name in ("llama", "gpt2", "opt", "gemma3"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    # No run has to look through all of this again when it collects garbage.
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _no_threads() -> Iterator[None]:
    yield
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"importing the program started {threads - 1} threads, which a fork would lose"


if _LIBRARY:  # in the server
    with _no_threads():
        _import_everything()
