"""Programs that a model writes run on their own, within limits, and confined or not at all."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from sleb_cli.engine.quality import program_runner, sandbox, written_code
from sleb_cli.engine.quality.written_code import CodeEval, is_run_by, passes, replace_code_eval
from sleb_plugins import MachineError

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows cannot limit what a program uses"
)


@pytest.fixture(scope="session")
def bubblewrap():
    """Skip where bubblewrap is missing, or the kernel gives it no namespaces, as in most
    containers.
    """
    try:
        passes("", "confined")
    except MachineError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["confined", "unconfined"])
def how(request):
    if request.param == "confined":
        request.getfixturevalue("bubblewrap")
    return request.param


BUSY = "import time\nwhile time.process_time() < {}: pass"


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import os; os._exit(0)\nassert False", False),
        ("import os; os._exit(86)", True),  # whoever means to can say so: no rights follow from it
        ("import os; os.write(2, b'what sleb reads'); os._exit(1)", False),
        ("import mmap; mmap.mmap(-1, 3 << 30)", True),
        ("import mmap; mmap.mmap(-1, 5 << 30)", False),
        ("open('large', 'wb').write(bytes(2 << 20))", False),
        ("open('small', 'wb').write(bytes(1 << 20)); assert open('small', 'rb').read()", True),
        ("print('x' * 100_000); assert input == input", True),
        ("import os; os.fork(); assert os.getpid()", True),
        ("print('\\ud800')", False),
        ("import numpy; assert numpy.ones(3).sum() == 3", True),
        ("import multiprocessing; assert multiprocessing.Pool(2).map(abs, [-1]) == [1]", True),
        (
            "import os, pathlib; assert pathlib.Path.home() == pathlib.Path.cwd(); open('x', 'w')",
            True,
        ),
    ],
)
def test_a_program_passes_if_it_ends_without_error(program, is_right, how):
    if sys.platform == "darwin" and "5 << 30" in program:
        pytest.skip("macOS does not limit memory")
    assert passes(program, how) is is_right


@pytest.fixture
def set_in_runner(monkeypatch, tmp_path):
    """Set a constant of the program that runs programs."""

    def set_in_runner(name, value):
        code, count = re.subn(
            f"(?m)^{name} = .*$", f"{name} = {value}", written_code.PROGRAM_RUNNER.read_text()
        )
        assert count == 1
        monkeypatch.setattr(written_code, "PROGRAM_RUNNER", tmp_path / "program_runner.py")
        written_code.PROGRAM_RUNNER.write_text(code)

    return set_in_runner


def test_a_program_that_computes_too_long_fails(set_in_runner, how):
    set_in_runner("CPU_SECONDS", 1)
    assert passes(BUSY.format(0.5), how)
    assert passes(BUSY.format(3), how) is False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_sleep_is_a_failure_and_waiting_for_a_processor_is_not(set_in_runner, how):
    set_in_runner("SECONDS_ASLEEP", 1)
    assert passes("import time; time.sleep(0.5)", how)
    assert passes("import os, time; os.setsid(); time.sleep(100)", how) is False
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda program: passes(program, how), [BUSY.format(0.4)] * 4))
    finally:
        os.sched_setaffinity(0, processors)


def test_a_program_that_got_no_processor_runs_again_alone(monkeypatch, how):
    monkeypatch.setattr(written_code, "SECONDS", 1.0)
    busy = "import time; time.sleep(5)"
    with (
        patch.object(CodeEval, "how", how),
        pytest.raises(MachineError, match=r"too busy .* in 1 seconds, alone"),
    ):
        CodeEval().compute(["", ""], [["x = 1"], [busy]], k=[1])
    answers = iter([True, None, None, False, True, False])
    tried = []
    monkeypatch.setattr(
        written_code, "passes", lambda program, how: tried.append(program) or next(answers)
    )
    monkeypatch.setattr(written_code, "usable_processors", lambda: 1)
    with patch.object(CodeEval, "how", how):
        found = CodeEval().compute(["t"] * 4, [["a"], ["b"], ["c"], ["d"]], k=[1])[1]
    assert found == {0: [True], 1: [True], 2: [False], 3: [False]}
    assert tried == ["a\nt", "b\nt", "c\nt", "d\nt", "b\nt", "c\nt"]


@pytest.fixture
def outside(tmp_path):
    """What a program may want: a file, a port and a process, named as in `ATTACKS`."""
    file = tmp_path / "file"
    file.write_text("as it was")
    file.chmod(0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(["sleep", "600"], env={"TOKEN": "secret"}) as process,
    ):
        spaces = [
            str(Path("/proc/self/ns", name).readlink())
            for name in ("ipc", "mnt", "net", "pid", "user")
        ]
        port = server.getsockname()[1]
        yield {"file": str(file), "port": port, "process": process.pid, "spaces": spaces}
        alive = process.poll() is None
        process.kill()
    assert (alive, file.read_text()) == (True, "as it was")


# Each comes to its end if it reaches what it wants. None does harm where nothing confines it.
ATTACKS = """
assert any(os.readlink('/proc/self/ns/' + each.split(':')[0]) == each for each in spaces)
assert open('/proc/self/oom_score_adj').read() != '1000\\n'
socket.create_connection(('127.0.0.1', port), 1)
os.kill(process, 0)
assert libc.ptrace(16, os.getppid(), None, None) == 0
open(f'/proc/{os.getppid()}/fd/2', 'w')
open(file).read()
os.listdir('/home')
os.utime(sys.prefix)
assert not all(os.statvfs(p).f_flag & os.ST_RDONLY for p in ('/', '/usr', '/dev', sys.prefix))
assert not os.statvfs('/proc').f_flag & os.ST_RDONLY
assert libc.unshare(0x10000000) == 0
assert os.listdir('/proc/self/fd') != ['0', '1', '2', '3']
assert {os.path.realpath(f'/proc/self/fd/{n}') for n in range(3)} != {'/dev/null'}
assert set(os.environ) - {'PATH', 'PWD', 'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE'}
assert 'CapEff:\\t0000000000000000' not in open('/proc/self/status').read()
assert 'NoNewPrivs:\\t1' not in open('/proc/self/status').read()
[open(str(n), 'wb').write(bytes(1 << 20)) for n in range(80)]
[open('/dev/shm/' + str(n), 'wb').write(bytes(1 << 20)) for n in range(80)]
[open(str(n), 'wb').close() for n in range(11_000)]
[os.fork() or (time.sleep(9), os._exit(0)) for n in range(70)]
""".strip().splitlines()
BEFORE = "import ctypes, os, socket, sys, time; libc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.usefixtures("bubblewrap")
def test_a_confined_program_reaches_nothing(outside):
    values = "; ".join(f"{name} = {value!r}" for name, value in outside.items())
    assert [attack for attack in ATTACKS if passes(f"{BEFORE}{values}\n{attack}", "confined")] == []


@pytest.mark.usefixtures("bubblewrap")
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_a_virtual_environment_is_read_only_wherever_it_lies(monkeypatch, place):
    with tempfile.TemporaryDirectory(dir=place) as environment:
        Path(environment, "file").write_text("as it was")
        monkeypatch.setattr(sandbox, "VISIBLE_PATHS", (*sandbox.VISIBLE_PATHS, environment))
        Path(environment).chmod(0o755)  # root's programs are nobody's
        assert passes(
            f"assert open('{environment}/file').read() == 'as it was'; open('x', 'w')", "confined"
        )
        assert passes(f"open('{environment}/file', 'w')", "confined") is False
        assert passes(f"open('{environment}/new', 'w')", "confined") is False


@pytest.mark.usefixtures("bubblewrap")
def test_nothing_that_a_program_started_stays(set_in_runner, tmp_path):
    set_in_runner("SECONDS_ASLEEP", 1)
    mark = f"{tmp_path}-left"
    leaving = "import os, time\nfor n in range(20):\n    if not os.fork():\n        os.setsid()\n"
    leaving += f"        os.execv('/bin/sleep', [{mark!r}, '60'])\ntime.sleep(0.2)\n"
    attacks = [
        leaving,
        leaving + "time.sleep(60)",
        "import os\n[os.kill(os.getppid(), s) for s in range(1, 32)]\nos.getpid() / 0",
        "import os\nwhile True: os.fork()",
    ]
    assert [passes(attack, "confined") for attack in attacks] == [True, False, False, False]
    assert passes(
        f"import os\nif not os.fork():\n    os.execv('/bin/sleep', [{mark!r}, '60'])", "unconfined"
    )
    left = [
        each for each in psutil.process_iter(["cmdline"]) if mark in (each.info["cmdline"] or ())
    ]
    assert psutil.wait_procs(left, timeout=10)[1] == []  # what was killed may take a moment


def test_a_program_ends_with_sleb(how, tmp_path):
    # Programs of `passes` have no arguments, so the test tells them by their folder.
    script = "from sleb_cli.engine.quality.written_code import passes\n"
    script += f"passes('import time; time.sleep(90)', {how!r})"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as sleb:
        running_in = []
        while not list(tmp_path.glob("sleb-*")) or len(running_in) < 2:
            time.sleep(0.05)
            running_in = psutil.Process(sleb.pid).children(recursive=True)
        sleb.kill()
    assert sys.platform != "linux" or psutil.wait_procs(running_in, timeout=10)[1] == []


def test_no_program_runs_where_bubblewrap_may_not_confine_it(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"confined .* No permissions") as caught:
        passes("x = 1", "confined")
    assert "container" in caught.value.hint


def test_macos_confines_nothing_and_cannot_tell_sleep_from_work(monkeypatch, tmp_path):
    monkeypatch.setattr(written_code, "PROGRAM_RUNNER", tmp_path / "program_runner.py")
    code = (
        Path(program_runner.__file__)
        .read_text()
        .replace("import sys\n", "import sys; sys.platform = 'darwin'\n")
    )
    written_code.PROGRAM_RUNNER.write_text(code)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MachineError, match="needs bubblewrap"):
        passes("", "confined")
    assert passes("x = 1", "unconfined")
    monkeypatch.setattr(written_code, "SECONDS", 2.0)
    assert passes("import time; time.sleep(100)", "unconfined") is None


def test_pass_at_k_is_that_of_its_paper():
    right, wrong = "x = 1", "x = 2"
    written = [[right, wrong, wrong], [wrong] * 3, [wrong, right]]
    with patch.object(CodeEval, "how", "unconfined"):
        means, found = CodeEval().compute(["assert x == 1"] * 3, written, k=[1, 2, 3])
    assert found == {0: [True, False, False], 1: [False] * 3, 2: [False, True]}
    assert means == pytest.approx({"pass@1": (1 / 3 + 1 / 2) / 3, "pass@2": (2 / 3 + 1) / 3})


def test_nothing_runs_while_tasks_are_loaded(monkeypatch):
    monkeypatch.setattr(written_code, "passes", None)
    assert CodeEval().compute(["assert x == 1"], [["x = 1"]]) == ({}, {})


def test_other_metrics_are_not_replaced(monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda path, *rest: path)
    with replace_code_eval():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert evaluate.load("bleu") == "bleu"
    assert not is_run_by("exact_match")
    assert not is_run_by(Path)
