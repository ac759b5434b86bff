"""Run a Python file that a model wrote, as a script in an empty folder: `python -I confined.py PROGRAM CODE`.

CODE is the exit code of a program that comes to its end, where its tests are, rather than exit before.

It may use little time and memory, write nothing outside the folder, and reach no network. That stops accidents, not
attacks: it still reads what the user may read. `--check` prints which of the last two this system cannot enforce.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import sys
from pathlib import Path

CPU_SECONDS = 3
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 64

# Of Linux: linux/sched.h, linux/prctl.h, and linux/landlock.h, whose calls have these numbers on all processors.
_NEW_USER, _NEW_NETWORK, _NO_NEW_PRIVILEGES = 0x10000000, 0x40000000, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE = 1 << 1
_WRITING = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # to files, and making and removing them
_MOVING, _TRUNCATING = 1 << 13, 1 << 14  # since versions 2 and 3


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def limit() -> None:
    """Limit what this process and its children use."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS refuses this one
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def leave_network() -> bool:
    """Enter a namespace without a network; return whether that worked."""
    return sys.platform == "linux" and not _libc().unshare(_NEW_USER | _NEW_NETWORK)


def keep_to(folder: str) -> bool:
    """Forbid writing outside a folder (Landlock, Linux 5.13 or later); return whether that worked."""
    if sys.platform != "linux":
        return False
    call = _libc().syscall
    version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    writing = _WRITING | (_MOVING if version > 1 else 0) | (_TRUNCATING if version > 2 else 0)
    handled = ctypes.c_uint64(writing)
    rules = call(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(ctypes.sizeof(handled)), 0)
    for place, allowed in ((folder, writing), (os.devnull, _WRITE_FILE)):
        rule = _Rule(allowed, os.open(place, os.O_PATH))
        if call(_ADD_RULE, rules, 1, ctypes.byref(rule), 0):
            return False
    return not _libc().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) and not call(_RESTRICT_SELF, rules, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


if __name__ == "__main__":
    limit()
    confined = {"the network": leave_network(), "files elsewhere": keep_to(str(Path.cwd()))}
    if sys.argv[1] == "--check":
        print(" and ".join(what for what, works in confined.items() if not works))
    else:
        runpy.run_path(sys.argv[1], run_name="__main__")
        sys.exit(int(sys.argv[2]))
