"""Programs that a model writes run on their own, within limits, and confined or not at all."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sleb_cli.engine.quality import written_code
from sleb_cli.engine.quality.written_code import CodeEval, is_run_by, ours, passes, running
from sleb_plugins import MachineError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit what a program uses")


@pytest.fixture(scope="session")
def confinement():
    """Skip where the kernel gives no namespaces, as in most containers."""
    namespaces = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", *namespaces, "true"], check=False).returncode:
        pytest.skip("no namespaces here")


@pytest.fixture(params=["confined", "unconfined"])
def how(request):
    if request.param == "confined":
        request.getfixturevalue("confinement")
    return request.param


BUSY = "import time\nwhile time.process_time() < {}: pass"


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(3)", False),
        ("import sys; sys.exit()\nassert False", False),
        ("import os; os._exit(0)\nassert False", False),
        ("import os; os._exit(86)", True),  # whoever means to can say so: no rights follow from it
        ("import os; os.write(2, b'what sleb reads'); os._exit(1)", False),
        (BUSY.format(2.5), True),
        (BUSY.format(9), False),
        ("import mmap; mmap.mmap(-1, 3 << 30)", True),
        ("import mmap; mmap.mmap(-1, 5 << 30)", False),
        ("open('large', 'wb').write(bytes(2 << 20))", False),
        ("open('small', 'wb').write(bytes(1 << 20)); assert open('small', 'rb').read()", True),
        ("print('x' * 100_000); assert input == input", True),
        ("import os; os.fork(); assert os.getpid()", True),
        ("print('\\ud800')", False),
        ("import numpy; assert numpy.ones(3).sum() == 3", True),
        ("if __name__ != '__main__': raise SystemExit(1)", True),
        ("import multiprocessing; assert multiprocessing.Pool(2).map(abs, [-1]) == [1]", True),
        ("import os, pathlib; assert pathlib.Path.home() == pathlib.Path.cwd(); open('x', 'w')", True),
    ],
)
def test_a_program_passes_if_it_ends_without_error(program, is_right, how):
    if sys.platform == "darwin" and "5 << 30" in program:
        pytest.skip("macOS does not limit memory")
    assert passes(program, how) is is_right


@pytest.fixture
def edited(monkeypatch, tmp_path):
    """Change a line of the program that runs programs."""

    def edited(line, changed):
        code, count = re.subn(f"(?m)^{line}$", changed, written_code.CONFINED.read_text())
        assert count == 1
        monkeypatch.setattr(written_code, "CONFINED", tmp_path / "confined.py")
        written_code.CONFINED.write_text(code)

    return edited


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_waiting_for_others_is_no_fault_and_sleep_is(edited, how):
    edited("SECONDS_ASLEEP = .*", "SECONDS_ASLEEP = 2")
    assert passes("import time; time.sleep(1.5)", how)
    assert passes("import time; time.sleep(100)", how) is False
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda program: passes(program, how), [BUSY.format(0.5)] * 8))
    finally:
        os.sched_setaffinity(0, processors)


def test_a_program_that_gets_no_processor_is_tried_again_alone_and_never_wrong(monkeypatch, how):
    monkeypatch.setattr(written_code, "SECONDS", 1.0)
    busy = "import time; time.sleep(5)"
    with running(how), pytest.raises(MachineError, match=r"too busy .* in 1 seconds, alone"):
        CodeEval().compute(["", ""], [["x = 1"], [busy]], k=[1])
    answers = iter([True, None, None, False, True, False])
    tried = []
    monkeypatch.setattr(written_code, "passes", lambda program, how: tried.append(program) or next(answers))
    monkeypatch.setattr(written_code, "usable_processors", lambda: 1)
    with running(how):
        found = CodeEval().compute(["t"] * 4, [["a"], ["b"], ["c"], ["d"]], k=[1])[1]
    assert found == {0: [True], 1: [True], 2: [False], 3: [False]}
    assert tried == ["a\nt", "b\nt", "c\nt", "d\nt", "b\nt", "c\nt"]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """What a program may want: files, sockets and a process, named as in `ATTACKS`."""
    file, place = tmp_path / "file", tmp_path / "socket"
    file.write_text("as it was")
    file.chmod(0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_UNIX) as abstract,
        subprocess.Popen(["sleep", "600"], env={"TOKEN": "secret"}) as process,
    ):
        monkeypatch.chdir(tmp_path)  # whose path may be too long for a socket
        local.bind(place.name)
        abstract.bind(f"\0{tmp_path}")
        for listening in (local, abstract):
            listening.listen()
        place.chmod(0o777)
        yield {
            "file": str(file),
            "folder": str(tmp_path),
            "namespaces": [str(each.readlink()) for each in Path("/proc/self/ns").iterdir() if each.name in NAMESPACES],
            "port": server.getsockname()[1],
            "process": process.pid,
        }
        stat, alive, nice = file.stat(), process.poll() is None, psutil.Process(process.pid).nice()
        found = [alive, nice, stat.st_mode & 0o777, file.read_text(), len(os.listdir())]
        process.kill()
    assert found == [True, psutil.Process().nice(), 0o777, "as it was", 2]


NAMESPACES = ("ipc", "mnt", "net", "pid", "user")
# Each comes to its end if it reaches what it wants. None does harm where nothing confines it.
ATTACKS = """
assert any(os.readlink('/proc/self/ns/' + each.split(':')[0]) == each for each in namespaces)
assert open('/proc/self/oom_score_adj').read() != '1000\\n'
socket.create_connection(('127.0.0.1', port), 1)
socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))
socket.socket(socket.AF_UNIX).connect(folder + '/socket')
socket.socket(socket.AF_UNIX).connect(chr(0) + folder)
os.kill(process, 0)
os.pidfd_open(process)
os.setpriority(os.PRIO_PROCESS, process, 1)
os.sched_setaffinity(process, {0})
resource.prlimit(process, resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
open(f'/proc/{process}/environ').read()
open(f'/proc/{process}/oom_score_adj', 'w').write('0')
assert libc.ptrace(16, process, None, None) == 0
assert libc.ptrace(16, os.getppid(), None, None) == 0
open(f'/proc/{os.getppid()}/mem', 'rb')
open(f'/proc/{os.getppid()}/fd/2', 'w')
open(file).read()
open(file, 'a')
os.chmod(file, 0o700)
os.utime(file)
os.rename(file, file)
os.link(file, folder + '/more')
os.mkdir(folder + '/made')
os.listdir('/home')
open('/etc/passwd')
os.utime(sys.prefix)
assert not all(os.statvfs(place).f_flag & os.ST_RDONLY for place in ('/', '/usr', '/proc', '/dev/null', sys.prefix))
open('/proc/sys/kernel/hostname', 'w')
assert libc.unshare(0x10000000) == 0
os.setuid(0 if os.getuid() else 1)
os.chroot('.')
assert os.listdir('/proc/self/fd') != ['0', '1', '2', '3']
assert {os.path.realpath(f'/proc/self/fd/{n}') for n in range(3)} != {'/dev/null'}
assert set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE'}
assert 'CapEff:\\t0000000000000000' not in open('/proc/self/status').read()
assert 'NoNewPrivs:\\t1' not in open('/proc/self/status').read()
[open(str(n), 'wb').write(bytes(1 << 20)) for n in range(80)]
[open('/dev/shm/' + str(n), 'wb').write(bytes(1 << 20)) for n in range(80)]
[open(str(n), 'wb').close() for n in range(11_000)]
[os.fork() or (time.sleep(9), os._exit(0)) for n in range(70)]
[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for n in range(70)]
""".strip().splitlines()
BEFORE = "import ctypes, os, resource, socket, sys, threading, time; libc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.usefixtures("confinement")
def test_a_confined_program_reaches_nothing(outside):
    values = "; ".join(f"{name} = {value!r}" for name, value in outside.items())
    assert [attack for attack in ATTACKS if passes(f"{BEFORE}{values}\n{attack}", "confined")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines programs")
@pytest.mark.usefixtures("confinement")
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_an_environment_may_lie_where_a_confined_program_writes(edited, place):
    with tempfile.TemporaryDirectory(dir=place) as environment:
        Path(environment).chmod(0o755)  # root's programs are nobody's
        Path(environment, "file").write_text("as it was")
        edited(r"SEEN = \(", f"SEEN = ({environment!r},")
        assert passes(f"assert open('{environment}/file').read() == 'as it was'; open('x', 'w')", "confined")
        assert passes(f"open('{environment}/file', 'w')", "confined") is False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines programs")
@pytest.mark.usefixtures("confinement")
def test_nothing_that_a_program_started_stays(edited, tmp_path):
    edited("SECONDS_ASLEEP = .*", "SECONDS_ASLEEP = 3")
    mark = f"{tmp_path}-left"
    leaving = "import os, time\nfor n in range(20):\n    if not os.fork():\n        os.setsid()\n"
    leaving += f"        os.execv('/bin/sleep', [{mark!r}, '60'])\ntime.sleep(0.2)\n"
    attacks = [
        leaving,
        leaving + "time.sleep(60)",
        "import os\n[os.kill(os.getppid(), s) for s in range(1, 32)]\nos.getpid() / 0",
    ]
    assert [passes(attack, "confined") for attack in attacks] == [True, False, False]
    assert passes(f"import os\nif not os.fork():\n    os.execv('/bin/sleep', [{mark!r}, '60'])", "unconfined")
    left = [each for each in psutil.process_iter(["cmdline"]) if mark in (each.info["cmdline"] or ())]
    assert psutil.wait_procs(left, timeout=10)[1] == []  # what was killed may take a moment


def test_a_program_ends_with_sleb(how, tmp_path):
    # Programs of `passes` have no arguments, so the test tells them by their folder.
    script = f"from sleb_cli.engine.quality.written_code import passes; passes('import time; time.sleep(90)', {how!r})"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as sleb:
        while (
            not list(tmp_path.glob("sleb-*"))
            or len(running_in := psutil.Process(sleb.pid).children(recursive=True)) < 2
        ):
            time.sleep(0.05)
        sleb.kill()
    assert sys.platform != "linux" or psutil.wait_procs(running_in, timeout=10)[1] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines programs")
@pytest.mark.usefixtures("confinement")
@pytest.mark.parametrize("refused", ["unshare", "mount", "syscall", "pivot_root", "umount2", "prctl", "capset"])
def test_no_program_runs_that_cannot_be_confined(edited, refused):
    edited(r"(def _call\(.*)", rf"\1\n    if name == {refused!r}: raise OSError(1, name)")
    with running("confined"), pytest.raises(MachineError, match=f"cannot be run confined .* {refused}") as caught:
        CodeEval().compute([""], [["x = 1"]], k=[1])
    assert "--run-code unconfined" in caught.value.hint


def test_other_systems_confine_nothing_and_tell_sleep_from_work_by_nothing(edited, monkeypatch):
    edited("import sys", "import sys; sys.platform = 'darwin'")
    with pytest.raises(MachineError, match="only Linux has namespaces"):
        passes("", "confined")
    assert passes("x = 1", "unconfined")
    monkeypatch.setattr(written_code, "SECONDS", 2.0)
    assert passes("import time; time.sleep(100)", "unconfined") is None


def test_pass_at_k_is_that_of_its_paper():
    right, wrong = "x = 1", "x = 2"
    written = [[right, wrong, wrong], [wrong] * 3, [wrong, right]]
    with running("unconfined"):
        means, found = CodeEval().compute(["assert x == 1"] * 3, written, k=[1, 2, 3])
    assert found == {0: [True, False, False], 1: [False] * 3, 2: [False, True]}
    assert means == pytest.approx({"pass@1": (1 / 3 + 1 / 2) / 3, "pass@2": (2 / 3 + 1) / 3})


def test_nothing_runs_while_tasks_are_loaded(monkeypatch):
    monkeypatch.setattr(written_code, "passes", None)
    assert CodeEval().compute(["assert x == 1"], [["x = 1"]]) == ({}, {})


def test_other_metrics_are_not_replaced(monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda path, *rest: path)
    with ours():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert evaluate.load("bleu") == "bleu"
    assert not is_run_by("exact_match")
    assert not is_run_by(Path)
