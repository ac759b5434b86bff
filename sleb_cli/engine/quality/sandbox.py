"""Confine programs that a model writes in Linux namespaces, by bubblewrap."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sleb_plugins import MachineError

FOLDER_BYTES = 32 << 20  # of /tmp, and of /dev/shm
NOBODY = 65534

VISIBLE_PATHS = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    sys.base_prefix,
    sys.prefix,
)
"""The paths of this machine that a confined program may read."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_ISOLATION = (
    *("--die-with-parent", "--as-pid-1", "--unshare-user", "--disable-userns"),
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
)
_OWN_FOLDER = ("--perms", "1777", "--size", str(FOLDER_BYTES), "--tmpfs")


def confining_command() -> list[str]:
    """Return the command that confines the one that follows it.

    Raises a MachineError if bubblewrap is missing.
    """
    bwrap = shutil.which("bwrap") if sys.platform == "linux" else None
    if bwrap is None:
        raise MachineError(
            "--run-code confined needs bubblewrap (Linux), whose bwrap is not on the PATH.",
            hint="Use `apt install bubblewrap` or `dnf install bubblewrap`; on other systems, "
            "--run-code unconfined in a container.",
        )
    read_only = ("--proc", "/proc", "--remount-ro", "/proc", "--remount-ro", "/", "--chdir", "/tmp")
    confined = [
        bwrap,
        *_ISOLATION,
        *_OWN_FOLDER,
        "/tmp",
        *_OWN_FOLDER,
        "/dev/shm",
        *_visible(),
        *read_only,
    ]
    if os.getuid():
        return confined
    # Linux does not limit root's processes, so root's programs are nobody's, who may not enter all
    # of root's folders.
    nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    outer = ("--die-with-parent", "--bind", "/proc", "/proc", "--dir", "/tmp")
    return [bwrap, *outer, *_visible(), *nobody, *confined]


def _visible() -> Iterator[str]:
    paths = sorted({path for path in VISIBLE_PATHS if Path(path).exists()} - {"/"})
    # Parents come first, and are open to all.
    for folder in sorted(
        {str(parent) for path in (*paths, *DEVICES) for parent in Path(path).parents} - {"/"}
    ):
        yield from ("--perms", "0755", "--dir", folder)
    for path in paths:
        yield from ("--ro-bind", path, path)
    for device in DEVICES:
        yield from ("--dev-bind", device, device)
