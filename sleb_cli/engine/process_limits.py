"""The memory and processors that a container or a batch system leaves to this process."""

from __future__ import annotations

import math
import os
from pathlib import Path

PROC = Path("/proc/self")
GROUPS = Path("/sys/fs/cgroup")
"""Where systems mount the control groups; version 1 has a folder for each controller."""

UNLIMITED = 2**63
"""More than any machine has."""


def left_under_limits() -> int:
    """Return the bytes that this process may still take, or `UNLIMITED`."""
    left = UNLIMITED
    for folder, version in _control_groups("memory"):
        left = min(left, _memory_left(folder, version))
    return left


def usable_processors() -> int:
    """Return the number of processors that this process may keep busy."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors: float = len(os.sched_getaffinity(0))
    for folder, version in _control_groups("cpu"):
        processors = min(processors, _processor_quota(folder, version))
    return math.ceil(processors)


def _processor_quota(folder: Path, version: int) -> float:
    """Return how many processors a control group may keep busy; infinite if unlimited."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return math.inf
    if quota in ("max", "-1"):
        return math.inf
    return int(quota) / int(period)


def _memory_left(folder: Path, version: int) -> int:
    limits = ["memory.limit_in_bytes"]
    current = "memory.usage_in_bytes"
    page_cache = ["total_active_file", "total_inactive_file"]
    if version == 2:
        # A process above `memory.high` is slowed down until it hardly moves.
        limits = ["memory.max", "memory.high"]
        current = "memory.current"
        page_cache = ["active_file", "inactive_file"]
    limit = UNLIMITED
    try:
        for name in limits:
            text = (folder / name).read_text().strip()
            if text != "max":
                limit = min(limit, int(text))
        used = int((folder / current).read_text())
        statistics = (folder / "memory.stat").read_text()
    except OSError:  # the uppermost group has no limit, so it lacks some of the files
        return UNLIMITED
    # The page cache counts as used, but the system frees it when memory is needed.
    for line in statistics.splitlines():
        name, value = line.split()
        if name in page_cache:
            used -= int(value)
    return max(0, limit - used)


def _control_groups(controller: str) -> list[tuple[Path, int]]:
    """Return the folder and version of this process's control group, and of all above it."""
    try:
        lines = (PROC / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = GROUPS
            version = 2
        elif controller in controllers.split(","):
            mount = GROUPS / controller
            version = 1
        else:
            continue
        # In a container, this may be the group's name outside, which is not found here.
        inside = Path(path.lstrip("/"))
        for above in (inside, *inside.parents):
            groups.append((mount / above, version))
    return groups
