"""How much memory a device has free."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Give the bytes that are free on the device; a container may leave a process less than the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """Give the bytes that the control group of this process leaves it; without one, more than any machine has."""
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())  # or "max", where there is none
        used = int((CONTROL_GROUP / "memory.current").read_text())
        held = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63
    reclaimable = int(held.get("file", 0)) - int(held.get("shmem", 0))
    return max(0, limit - used + reclaimable)
