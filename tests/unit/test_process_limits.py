"""Limits of control groups, in folders that look like Linux's."""

import pytest

from sleb_cli.engine import process_limits
from sleb_cli.engine.process_limits import UNLIMITED, left_under_limits, usable_processors


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """Write the names of this process's groups, and their files."""
    groups = tmp_path / "groups"
    monkeypatch.setattr(process_limits, "PROC", tmp_path)
    monkeypatch.setattr(process_limits, "GROUPS", groups)

    def write(names, files):
        (tmp_path / "cgroup").write_text(names)
        for name, value in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(f"{value}\n")

    return write


def memory_files(folder, limit, high, used):
    """Return the files of a group of either version, with a page cache of 200 (1: 150) bytes."""
    pages = "inactive_file 150\nactive_file 50\ntotal_inactive_file 100\ntotal_active_file 50"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": used,
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"anon 400\n{pages}",
    }


# The limit, the limit that slows down, and what is used, of each group.
JOB = {
    "slurm/job/step": ("max", "max", 700),
    "slurm/job": (2000, "max", 1900),
    "slurm": (9000, "max", 2000),
}
STEP = "0::/slurm/job/step\n"
SLOWED = JOB | {"slurm/job/step": ("max", 600, 700)}
LOWERED = JOB | {"slurm": (1000, "max", 2000)}
VERSION_1 = {"other": (1, "max", 1), "memory/job": (1000, 0, 700), "memory/another": (1, 0, 1)}


@pytest.mark.parametrize(
    ("names", "groups", "left"),
    [
        pytest.param("", {}, UNLIMITED, id="no groups"),
        pytest.param("0::/\n", {".": (1000, "max", 700)}, 500, id="the page cache gives way"),
        pytest.param(STEP, JOB, 300, id="the least of all groups above"),
        pytest.param(STEP, SLOWED, 100, id="slowed down"),
        pytest.param(STEP, LOWERED, 0, id="lowered below what is used"),
        pytest.param("4:cpu:/other\n3:memory:/job\n0::/\n", VERSION_1, 450, id="version 1"),
        pytest.param("3:memory:/docker/4f2a\n", {"memory": (1000, 0, 700)}, 450, id="in docker"),
    ],
)
def test_the_least_that_any_group_leaves(control_groups, names, groups, left):
    files = {}
    for folder, numbers in groups.items():
        files |= memory_files(folder, *numbers)
    control_groups(names, files)
    assert left_under_limits() == left


CPU_1 = {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("names", "files", "processors"),
    [
        ("", {}, 4),
        ("0::/job\n", {"job/cpu.max": "max 100000", "cpu.max": "250000 100000"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("3:memory:/\n1:cpu:/job\n", CPU_1, 2),
        ("1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_the_fewest_processors_of_any_group(monkeypatch, control_groups, names, files, processors):
    monkeypatch.setattr(process_limits.os, "sched_getaffinity", lambda _: range(4), raising=False)
    control_groups(names, files)
    assert usable_processors() == processors
