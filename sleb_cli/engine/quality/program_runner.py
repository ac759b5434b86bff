"""Run the Python program on standard input, which a model wrote, within limits.

The exit code says whether the program came to its end. Any other code, and the last line on stderr,
say why it did not run. This file runs on its own, without the rest of sleb.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PASSED, FAILED = 86, 85
CPU_SECONDS = 3
SECONDS_ASLEEP = 10
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 20
FILES = 10_000
OPEN_FILES = 64
PROCESSES = 64

# Of linux/prctl.h.
_DIE_WITH_PARENT, _DUMPABLE = 1, 4


def main(*, confined: bool) -> None:
    """Run the program in a child, and exit."""
    program = sys.stdin.buffer.read()
    # Linux withholds this one from the first process of a namespace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Or the program, which is of the same user, could take this process over.
    _set_process(_DUMPABLE, 0)
    has_started, started = os.pipe()
    child = os.fork()
    if not child:
        run(program, confined=confined, started=started)
    os.close(started)
    if not os.read(has_started, 1):
        sys.exit(1)
    sys.exit(PASSED if watch(child, confined=confined) else FAILED)


def run(program: bytes, *, confined: bool, started: int) -> None:
    """Run a program, which inherits no open file, and exit."""
    _set_process(_DIE_WITH_PARENT, signal.SIGKILL)
    _set_process(_DUMPABLE, 1)
    file = Path.cwd() / "program.py"
    os.environ |= dict.fromkeys(("HOME", "TMPDIR"), str(file.parent))
    file.write_bytes(program)
    nothing = os.open(os.devnull, os.O_RDWR)
    limit(confined=confined)
    os.write(started, b"1")
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, OPEN_FILES)
    sys.argv = [str(file)]
    runpy.run_path(str(file), run_name="__main__")
    sys.exit(PASSED)


def limit(*, confined: bool) -> None:
    """Limit the resources of this process and of each of its children."""
    limits = {"CPU": CPU_SECONDS, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0}
    if sys.platform == "linux":  # macOS refuses this one
        limits["AS"] = MEMORY_BYTES
    if confined:  # else all that the user runs would count
        limits["NPROC"] = PROCESSES
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def watch(program: int, *, confined: bool) -> bool:
    """Wait for a child; return whether it ends by itself, not by an error, a limit or sleep."""
    checked = time.monotonic()
    asleep = 0
    sleb = select.poll()
    sleb.register(sys.stderr, 0)  # which fails once sleb, at the other end, is gone
    while asleep < SECONDS_ASLEEP and not sleb.poll(0):
        ended, status = os.waitpid(program, os.WNOHANG)
        if confined and count_files() > FILES:
            return False
        if ended:
            return os.waitstatus_to_exitcode(status) == PASSED
        time.sleep(0.005)
        if time.monotonic() > checked + 1:
            checked = time.monotonic()
            asleep += is_asleep(program)
    return False


def count_files() -> int:
    """Count the files in the folders that a confined program writes to."""
    folders = map(os.statvfs, ("/tmp", "/dev/shm"))
    return sum(system.f_files - system.f_ffree for system in folders)


def is_asleep(program: int) -> bool:
    """Whether no thread of the program's session, or this one, runs or waits for a disk (Linux)."""
    states = set()
    sessions = {os.getsid(0), os.getsid(program)}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getsid(int(process.name)) in sessions and int(process.name) != os.getpid():
                for thread in (process / "task").iterdir():
                    with suppress(OSError):
                        text = (thread / "stat").read_text(errors="replace")
                        states.add(text.rpartition(")")[2].split()[0])
    return bool(states) and not states & {"R", "D"}


def _set_process(attribute: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(attribute, value, 0, 0, 0):
        sys.exit("prctl failed")


if __name__ == "__main__":
    main(confined=sys.argv[1] == "confined")
