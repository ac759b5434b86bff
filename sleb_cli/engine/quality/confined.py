"""Run the Python program on standard input, which a model wrote: `python -I confined.py confined|unconfined`.

The exit code says whether it came to its end. Any other one, and the last line on stderr, say that it did not run as
asked. Nothing outside can be changed by a confined program: it is in namespaces of its own (Linux), where it sees few
files and writes into a small /tmp. Its first process, which watches it, takes all others along when it ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
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
DISK_BYTES = 64 << 20
FILES = 10_000
OPEN_FILES = 64
PROCESSES = 64

SEEN = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/alternatives"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", sys.base_prefix, sys.prefix),
)
"""What a confined program sees of the files of this machine."""

# Of Linux: linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h.
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mounts, IPC, users, processes, net
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _BIND, _ALL_BELOW, _PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18
_MOUNT_SETATTR, _HERE, _RECURSIVE, _DETACH = 442, -100, 0x8000, 2
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _CAPABILITIES = 1, 38, 0x20080522
_NOBODY = 65534


def _call(name: str, *given: object) -> None:
    """Call a function of libc, which must succeed."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*given):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        _call("prctl", _DIE_WITH_PARENT, 9, 0, 0, 0)


def _fork() -> int:
    if not (child := os.fork()):
        _end_with_parent()
    return child


def enter_namespaces() -> None:
    """Leave users, mounts, IPC and network of this machine; the next child leaves its processes, too.

    Root's programs are nobody's: what root may do, and how many processes it may have, has no limit.
    """
    process, user, group = os.getpid(), os.getuid(), os.getgid()
    entered, entering = os.pipe()
    if not (helper := _fork()):
        os.close(entering)
        if not os.read(entered, 1):
            os._exit(1)
        folder, also = Path(f"/proc/{process}"), "" if user else f"\n{_NOBODY} {_NOBODY} 1"
        if user:
            (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(f"{user} {user} 1{also}")
        (folder / "gid_map").write_text(f"{group} {group} 1{also}")
        os._exit(0)
    _call("unshare", _NEW_NAMESPACES)
    os.write(entering, b"1")
    if os.waitpid(helper, 0)[1]:
        sys.exit(1)


def leave_files() -> None:
    """Replace all files by what is `SEEN`, read-only, and a small and empty /tmp."""
    root = Path.cwd()
    _mount(None, Path("/"), None, _ALL_BELOW | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SETUID | _NO_DEVICES)
    for name in ("dev", "proc", "tmp"):
        (root / name).mkdir()
    (root / "dev/shm").symlink_to("../tmp")
    _mount("tmpfs", root / "tmp", "tmpfs", _NO_SETUID | _NO_DEVICES, f"size={DISK_BYTES},nr_inodes={FILES}")
    for place in map(Path, sorted(filter(os.path.exists, set(SEEN) - {"/"}))):  # of which some may lie in /tmp
        inside = root / place.relative_to("/")
        (inside if place.is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
        if not inside.exists():
            inside.touch()
        _mount(str(place), inside, None, _BIND | _ALL_BELOW)
    _mount("proc", root / "proc", "proc", _NO_SETUID | _NO_DEVICES)
    (root / "proc/sys/user/max_user_namespaces").write_text("0")
    _set_attributes(root, _READ_ONLY | _NO_SETUID, 0, _RECURSIVE)
    _set_attributes(root / "tmp", 0, _READ_ONLY, 0)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/tmp")


def _mount(what: str | None, where: Path, kind: str | None, flags: int, options: str = "") -> None:
    source, name = (None if word is None else os.fsencode(word) for word in (what, kind))
    _call("mount", source, bytes(where), name, ctypes.c_ulong(flags), options.encode())


def _set_attributes(where: Path, given: int, taken: int, how: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(given, taken)
    _call("syscall", _MOUNT_SETATTR, _HERE, bytes(where), how, attributes, ctypes.c_size_t(32))


def give_up_rights() -> None:
    """Become nobody if root, and nobody who can do more than the user."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITIES), (ctypes.c_uint32 * 6)())


def limit(*, confined: bool) -> None:
    """Limit what this process and each of its children uses."""
    limits = {"CPU": CPU_SECONDS, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0}
    if sys.platform == "linux":  # macOS refuses this one
        limits["AS"] = MEMORY_BYTES
    if confined:  # else all that the user runs would count
        limits["NPROC"] = PROCESSES
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def watch(program: int) -> bool:
    """Whether a child comes to its end, rather than to an error, a limit, or a sleep."""
    checked, asleep = time.monotonic(), 0
    while not (ended := os.waitpid(program, os.WNOHANG))[0]:
        time.sleep(0.005)
        if time.monotonic() > checked + 1:
            checked, asleep = time.monotonic(), asleep + is_asleep()
            if asleep == SECONDS_ASLEEP:
                return False
    return os.waitstatus_to_exitcode(ended[1]) == PASSED


def is_asleep() -> bool:
    """Whether no thread of this session, except in this process, wants a processor or waits for a disk (Linux)."""
    states = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getsid(int(process.name)) == os.getsid(0) and int(process.name) != os.getpid():
                for thread in (process / "task").iterdir():
                    with suppress(OSError):
                        states.add((thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0])
    return bool(states) and not states & {"R", "D"}


def run(program: bytes, *, confined: bool, started: int) -> None:
    """Run a program, which can reach nothing that this process has open, and exit."""
    file = Path.cwd() / "program.py"
    os.environ |= dict.fromkeys(("HOME", "TMPDIR"), str(file.parent))
    file.write_bytes(program)
    nothing = os.open(os.devnull, os.O_RDWR)
    limit(confined=confined)
    if confined:
        give_up_rights()
    os.write(started, b"1")
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, OPEN_FILES)
    sys.argv = [str(file)]
    runpy.run_path(str(file), run_name="__main__")
    sys.exit(PASSED)


def main(*, confined: bool) -> None:
    """Run the program on standard input."""
    if confined and sys.platform != "linux":
        sys.exit("only Linux has namespaces")
    _end_with_parent()
    program = sys.stdin.buffer.read()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the first process of a namespace does not get from inside
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather than that of the model
    if confined:
        enter_namespaces()
        if first := _fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
        leave_files()
    has_started, started = os.pipe()
    if not (child := _fork()):
        run(program, confined=confined, started=started)
    os.close(started)
    if not os.read(has_started, 1):
        sys.exit(1)
    sys.exit(PASSED if watch(child) else FAILED)


if __name__ == "__main__":
    main(confined=sys.argv[1] == "confined")
