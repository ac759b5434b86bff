"""Programs that a model writes run on their own, within limits."""

import socket
import sys
from pathlib import Path

import pytest

from sleb_cli.engine.quality.written_code import CodeEval, is_run_by, ours, passes, unconfined

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit what a program uses")


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(3)", False),
        ("import sys; sys.exit()\nassert False", False),
        ("import os; os._exit(0)\nassert False", False),
        ("while True: pass", False),  # 3 seconds of the processor
        ("x = bytearray(6 << 30)", False),
        ("open('large', 'wb').write(bytes(2 << 20))", False),
        ("open('small', 'wb').write(bytes(2 << 10)); assert open('small', 'rb').read()", True),
        ("print('x' * 100_000); assert input == input", True),
        ("import os; os.fork(); assert os.getpid()", True),
        ("print('\\ud800')", False),
        ("import numpy; assert numpy.ones(3).sum() == 3", True),
        ("if __name__ != '__main__': raise SystemExit(1)", True),
    ],
)
def test_a_program_passes_if_it_ends_without_error(program, is_right):
    if sys.platform == "darwin" and "6 << 30" in program:
        pytest.skip("macOS does not limit memory")
    assert passes(program) is is_right


def test_a_program_that_waits_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("sleb_cli.engine.quality.written_code.SECONDS", 1.0)
    assert not passes("import os, time; os.fork(); time.sleep(60)")


def test_a_program_reaches_no_network_and_writes_nowhere_else(tmp_path):
    free, file = unconfined(), tmp_path / "file"
    file.write_text("as it was")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reaches = passes(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)")
    assert reaches is ("the network" in free)
    for program in (f"open({str(file)!r}, 'w')", f"import os; os.remove({str(file)!r})"):
        assert passes(program) is ("files elsewhere" in free)
    assert free or file.read_text() == "as it was"


def test_pass_at_k_is_that_of_its_paper():
    right, wrong = "x = 1", "x = 2"
    means, found = CodeEval().compute(["assert x == 1"] * 2, [[right, wrong, wrong], [wrong] * 3], k=[1, 2, 10])
    assert found == {0: [True, False, False], 1: [False] * 3}
    assert means == pytest.approx({"pass@1": (1 / 3) / 2, "pass@2": (2 / 3) / 2})


def test_other_metrics_are_not_replaced(monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda path, *rest: path)
    with ours():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert evaluate.load("bleu") == "bleu"
    assert not is_run_by("exact_match")
    assert not is_run_by(Path)
