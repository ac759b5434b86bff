"""What limits of memory leave to a process; those of control groups in folders that look like Linux's."""

import sys
from pathlib import Path

import psutil
import pytest

from sleb_cli.engine import memory_limits
from sleb_cli.engine.memory_limits import UNLIMITED, left_under_limits


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """Say which groups the process is in, and what is mounted below the temporary folder: root, folder, kind."""
    monkeypatch.setattr(memory_limits.sys, "platform", "linux")
    monkeypatch.setattr(memory_limits, "_left_of_resources", lambda: iter(()))
    monkeypatch.setattr(memory_limits, "PROC", tmp_path)

    def say(groups: str, *mounts: tuple[str, str, str]) -> Path:
        (tmp_path / "cgroup").write_text(groups)
        lines = [f"30 23 0:26 {root} {tmp_path}{place} rw shared:9 - {kind}\n" for root, place, kind in mounts]
        (tmp_path / "mountinfo").write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n" + "".join(lines))
        return tmp_path

    return say


def version_2(folder: Path, limit: str, used: int, high: str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"max": limit, "high": high, "current": used}.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")
    (folder / "memory.stat").write_text("anon 400\nfile 250\nshmem 50\ninactive_file 150\nactive_file 50\n")


def version_1(folder: Path, limit: int, used: int) -> None:
    folder.mkdir(parents=True)
    for name, number in {"limit": limit, "usage": used}.items():
        (folder / f"memory.{name}_in_bytes").write_text(f"{number}\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 150\ntotal_active_file 50\n")


CGROUP_2 = ("/", "/unified", "cgroup2 cgroup2 rw")
MEMORY = ("/", "/memory", "cgroup cgroup rw,memory")


def test_without_groups_or_limits_nothing_is_limited(linux):
    assert left_under_limits() == UNLIMITED
    folder = linux("0::/job\n", CGROUP_2)
    assert left_under_limits() == UNLIMITED
    version_2(folder / "unified" / "job", "max", 700)
    assert left_under_limits() == UNLIMITED
    version_2(linux("0::/\n", CGROUP_2) / "unified", "1000", 700)  # a container, whose page cache gives way
    assert left_under_limits() == 500


def test_the_least_of_all_groups_above_counts(linux):
    folder = linux("0::/slurm/job_7/step_0\n", CGROUP_2) / "unified" / "slurm"
    version_2(folder / "job_7" / "step_0", "max", 700)
    version_2(folder / "job_7", "2000", 1900)
    version_2(folder, "9000", 2000)
    assert left_under_limits() == 300
    version_2(folder / "job_7" / "step_0", "max", 700, high="600")
    assert left_under_limits() == 100
    version_2(folder, "1000", 2000)  # lowered below what is used
    assert left_under_limits() == 0


def test_version_1_counts_the_group_of_the_memory_controller(linux):
    cpu = ("/", "/cpu", "cgroup cgroup rw,cpu")
    folder = linux("4:cpu,cpuacct:/other\n3:memory:/slurm/job_7\n0::/\n", cpu, MEMORY, CGROUP_2)
    version_1(folder / "cpu" / "other", 1, 1)
    version_1(folder / "memory" / "slurm" / "job_7", 1000, 700)
    version_1(folder / "memory" / "slurm" / "job_8", 1, 1)
    assert left_under_limits() == 500


def test_a_group_may_have_another_name_outside_its_container(linux):
    mounted = ("/docker/4f2a", "/memory", "cgroup cgroup rw,memory")
    version_1(linux("3:memory:/docker/4f2a\n", mounted) / "memory", 1000, 700)
    assert left_under_limits() == 500
    linux("3:memory:/../host\n", mounted)
    assert left_under_limits() == 500


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to these limits")
def test_limits_of_the_shell_count(monkeypatch):
    unlimited = (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY)
    limits = {psutil.RLIMIT_AS: unlimited, psutil.RLIMIT_DATA: unlimited}
    monkeypatch.setattr(psutil.Process, "rlimit", lambda process, resource: limits[resource])
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: type("Memory", (), {"vms": 900, "data": 400})())
    assert list(memory_limits._left_of_resources()) == []
    limits[psutil.RLIMIT_AS] = (1000, 2000)
    assert left_under_limits() == 100
    limits[psutil.RLIMIT_DATA] = (450, 2000)
    assert left_under_limits() == 50
    limits[psutil.RLIMIT_AS] = (800, 2000)
    assert left_under_limits() == 0
