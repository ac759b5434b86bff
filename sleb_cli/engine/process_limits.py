"""How much memory and how many processors a container, a batch system or a shell leaves to this
process.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

PROC = Path("/proc/self")
GROUPS = Path("/sys/fs/cgroup")
"""Where systems mount the control groups; version 1 has a folder for each controller."""

UNLIMITED = 2**63
"""More than any machine has."""


_FILES = {
    1: (
        ["memory.limit_in_bytes"],
        "memory.usage_in_bytes",
        ["total_active_file", "total_inactive_file"],
    ),
    # A process above `memory.high` is slowed down until it hardly moves.
    2: (["memory.max", "memory.high"], "memory.current", ["active_file", "inactive_file"]),
}
"""The files of a control group of each version: its limits, its use, and the fields of its page
cache.
"""


def left_under_limits() -> int:
    """Return the bytes that this process may still take, or `UNLIMITED`."""
    if sys.platform != "linux":
        return UNLIMITED
    group_limits = (_memory_left(*group) for group in _control_groups("memory"))
    return min([UNLIMITED, *_memory_left_by_ulimit(), *group_limits])


def usable_processors() -> int:
    """Return the number of processors that this process may keep busy."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    quotas = (_processor_quota(*group) for group in _control_groups("cpu"))
    return math.ceil(min([len(os.sched_getaffinity(0)), *quotas]))


def _processor_quota(folder: Path, version: int) -> float:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        words = " ".join((folder / name).read_text() for name in names).replace("max", "inf")
        quota, period = map(float, words.split())
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 else math.inf


def _memory_left_by_ulimit() -> Iterator[int]:
    """`ulimit -v` and `ulimit -d`."""
    process = psutil.Process()
    memory = process.memory_info()
    for resource, used in ((psutil.RLIMIT_AS, memory.vms), (psutil.RLIMIT_DATA, memory.data)):
        limit, _ = process.rlimit(resource)
        if limit != psutil.RLIM_INFINITY:
            yield max(0, limit - used)


def _memory_left(folder: Path, version: int) -> int:
    limits, usage, page_cache = _FILES[version]
    with suppress(
        OSError, ValueError
    ):  # the uppermost group has no limit, so it lacks some of the files
        limit = min(
            int(text) for name in limits if (text := (folder / name).read_text().strip()) != "max"
        )
        used = int((folder / usage).read_text())
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        # The page cache counts as used, but the system frees it when memory is needed.
        return max(0, limit - used + sum(int(statistics.get(pages, 0)) for pages in page_cache))
    return UNLIMITED


def _control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folder and version of this process's control group, and of all above it."""
    try:
        lines = (PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount, version = (GROUPS / controller, 1) if controllers else (GROUPS, 2)
        inside = Path(
            path.lstrip("/")
        )  # in a container, this may be the group's name outside, which is not found here
        yield from ((mount / above, version) for above in (inside, *inside.parents))
