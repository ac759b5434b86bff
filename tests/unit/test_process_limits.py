"""What limits leave to a process; those of control groups in folders that look like Linux's."""

import sys

import psutil
import pytest

from sleb_cli.engine import process_limits
from sleb_cli.engine.process_limits import UNLIMITED, left_under_limits, usable_processors

# The limit, the limit that slows down, and what is used, of each group.
JOB = {
    "slurm/job/step": ("max", "max", 700),
    "slurm/job": (2000, "max", 1900),
    "slurm": (9000, "max", 2000),
}


@pytest.mark.parametrize(
    ("cgroup", "groups", "left"),
    [
        pytest.param("", {}, UNLIMITED, id="no groups"),
        pytest.param(
            "0::/\n", {"": (1000, "max", 700)}, 500, id="a container, whose page cache gives way"
        ),
        pytest.param("0::/slurm/job/step\n", JOB, 300, id="the least of all groups above"),
        pytest.param(
            "0::/slurm/job/step\n",
            JOB | {"slurm/job/step": ("max", 600, 700)},
            100,
            id="slowed down",
        ),
        pytest.param(
            "0::/slurm/job/step\n",
            JOB | {"slurm": (1000, "max", 2000)},
            0,
            id="lowered below what is used",
        ),
        pytest.param(
            "4:cpu:/other\n3:memory:/job\n0::/\n",
            {"other": (1, "max", 1), "memory/job": (1000, 0, 700), "memory/another": (1, 0, 1)},
            450,
            id="version 1",
        ),
        pytest.param(
            "3:memory:/docker/4f2a\n", {"memory": (1000, 0, 700)}, 450, id="named otherwise outside"
        ),
    ],
)
def test_the_least_that_any_group_leaves(tmp_path, monkeypatch, cgroup, groups, left):
    monkeypatch.setattr(process_limits.sys, "platform", "linux")
    monkeypatch.setattr(process_limits, "_memory_left_by_ulimit", lambda: iter(()))
    monkeypatch.setattr(process_limits, "PROC", tmp_path)
    monkeypatch.setattr(process_limits, "GROUPS", tmp_path / "groups")
    (tmp_path / "cgroup").write_text(cgroup)
    for name, (limit, high, used) in groups.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "max": limit,
            "high": high,
            "current": used,
            "limit_in_bytes": limit,
            "usage_in_bytes": used,
        }
        for kind, value in values.items():
            (folder / f"memory.{kind}").write_text(f"{value}\n")
        pages = "inactive_file 150\nactive_file 50\n"
        (folder / "memory.stat").write_text(
            f"anon 400\n{pages}total_inactive_file 100\ntotal_active_file 50\n"
        )
    assert left_under_limits() == left


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to these limits")
@pytest.mark.parametrize(
    ("memory", "data", "left"),
    [(-1, -1, UNLIMITED), (1000, -1, 100), (1000, 450, 50), (800, 450, 0)],
)
def test_limits_of_the_shell_count(monkeypatch, memory, data, left):
    limits = {psutil.RLIMIT_AS: (memory, 2000), psutil.RLIMIT_DATA: (data, 2000)}
    monkeypatch.setattr(process_limits, "_control_groups", lambda controller: iter(()))
    monkeypatch.setattr(psutil.Process, "rlimit", lambda process, resource: limits[resource])
    monkeypatch.setattr(
        psutil.Process,
        "memory_info",
        lambda process: type("Memory", (), {"vms": 900, "data": 400})(),
    )
    assert left_under_limits() == left


@pytest.mark.parametrize(
    ("cgroup", "groups", "processors"),
    [
        ("", {}, 4),
        ("0::/job\n", {"job/cpu.max": "max 100000", "cpu.max": "250000 100000"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        (
            "3:memory:/\n1:cpu:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_the_fewest_processors_of_any_group(tmp_path, monkeypatch, cgroup, groups, processors):
    monkeypatch.setattr(process_limits.sys, "platform", "linux")
    monkeypatch.setattr(
        process_limits.os, "sched_getaffinity", lambda process: range(4), raising=False
    )
    monkeypatch.setattr(process_limits, "PROC", tmp_path)
    monkeypatch.setattr(process_limits, "GROUPS", tmp_path / "groups")
    (tmp_path / "cgroup").write_text(cgroup)
    for name, value in groups.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    assert usable_processors() == processors
