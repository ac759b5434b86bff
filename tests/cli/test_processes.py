"""Several processes that a launcher started together: the same plan as one, and one end for all.

Most are forked from the test, as a launcher would start them: what a test changes, they have
changed.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import Result, calibration, llama_config, plan_bytes, save_model, slow
from sleb_cli import __main__ as program
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.quality import texts
from sleb_cli.processes import process_rank
from sleb_cli.requests import journal_of
from sleb_plugins import DataError

SEARCHES = {
    "fast": ("--fast", "--samples", "13"),
    "holdout": ("--holdout", "0.3"),
    "cosine": ("--metric", "cosine"),
    "spans": ("--strategy", "contiguous", "--metric", "angular"),
    "streamed": ("--stream",),
    "on disk": ("--device", "auto", "--device-map", "sequential"),
}


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def run_as(rank, variables, words):
    """Run the program in this process, a copy of the test's."""
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["sleb", *map(str, words)]
    program.run()


def together(count, *words):
    """Run `sleb` in this many processes that are copies of this one, and tell how each ended."""
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    given |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=run_as, args=(rank, given, words)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    results = []
    for rank, child in enumerate(children):
        said = Path(f"{rank}.stdout").read_text(), Path(f"{rank}.stderr").read_text()
        results.append(Result(child.exitcode, *said))
    return results


@pytest.fixture
def search(tiny_llama, text_file):
    options = "--remove 3 --batch-size 1 --sample-tokens 4 --device cpu"
    return ["search", tiny_llama, *options.split(), *calibration(text_file, samples=7)]


@pytest.fixture
def whole(sleb, search, tmp_path):
    """The plan that one process finds."""

    def run(*options):
        sleb(*search, *options, "-o", "whole.json", "-q")
        return plan_bytes(tmp_path / "whole.json")

    return run


def all_well(ended):
    main, *others = ended
    assert main.exit_code == 0, main.stderr
    for other in others:
        assert (other.exit_code, other.stdout, other.stderr) == (0, "", "")
    return main


@pytest.mark.parametrize("count", [3, slow(2), slow(8)])
@pytest.mark.parametrize("options", ["fast", "holdout", *map(slow, [*SEARCHES][2:])])
def test_processes_find_the_plan_of_one(
    search, whole, tmp_path, tiny_llama, spread, options, count
):
    if options == "on disk":
        spread(tiny_llama, 0)
    expected = whole(*SEARCHES[options])
    main = all_well(together(count, *search, *SEARCHES[options], "-o", "plan.json"))
    assert plan_bytes(tmp_path / "plan.json") == expected
    assert main.stdout.count("wrote plan.json") == main.stderr.count("step 1 of 3") == 1
    assert not journal_of(tmp_path / "plan.json").exists()


@contextmanager
def at_job(rank, job, do):
    """Have a process do something when it is about to score its n-th job."""
    score, seen = Passes.score, []

    def counted(self, metric, removed, jobs, *rest):
        seen.extend(jobs)
        if process_rank() == rank and len(seen) >= job:
            do()
        return score(self, metric, removed, jobs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "score", counted)
        yield


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_if_a_process_dies_all_end_and_another_number_resumes(search, whole, tmp_path):
    expected = whole()
    with at_job(1, 8, die):
        main, victim = together(2, *search)
    assert (main.exit_code, victim.exit_code) == (7, -signal.SIGKILL)
    assert "error: One of the 2 processes has died or was stopped." in main.stderr
    assert "plan.json.journal: rerun with --resume to continue" in main.stderr
    assert "Traceback" not in main.stderr
    kept = len(journal_of(tmp_path / "plan.json").read_bytes().splitlines()) - 1
    main = all_well(together(3, *search, "--resume"))
    assert f"Continuing with the {kept} measurements" in main.stderr
    assert kept >= 12
    assert plan_bytes(tmp_path / "plan.json") == expected


def test_if_the_main_one_dies_the_others_end_quietly(search, tmp_path):
    with at_job(0, 8, die):
        main, *others = together(3, *search)
    assert main.exit_code == -signal.SIGKILL
    assert [(each.exit_code > 0, each.stdout) for each in others] == [(True, "")] * 2
    assert journal_of(tmp_path / "plan.json").exists()


def refuse():
    raise DataError("The text has vanished.", hint="Bring it back.")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (refuse, 5, ["error: In process 1 of 3: The text has vanished.", "rerun with --resume"]),
        # A bug keeps its traceback.
        (lambda: [][0], 1, ["IndexError: list index out of range", "test_processes.py"]),
    ],
    ids=["an error", "a bug"],
)
def test_a_failure_in_one_of_them_is_told_by_the_main_one(search, fault, code, words):
    with at_job(1, 4, fault):
        main, *others = together(3, *search)
    assert main.exit_code == code
    for each in words:
        assert each in main.stderr
    assert main.stderr.count("error: ") <= 1
    assert [(each.exit_code, each.stdout + each.stderr) for each in others] == [(1, "")] * 2


def test_an_error_in_all_processes_is_said_once():
    for command, code, words in (
        ("search nowhere --remove 1", 4, "nowhere is neither a local folder nor"),
        ("search nowhere --removee 1", 2, "No such option: --removee"),
        ("apply nowhere --blocks 1", 4, "nowhere is neither a local folder nor"),
        ("apply nowhere --blocks 1 --recover", 2, "--recover works in one process, not"),
        ("bench nowhere --blocks 1", 2, "`bench` times models in one process, not in 2"),
    ):
        main, other = together(2, *command.split())
        assert main.exit_code == code
        assert main.stderr.count(words) == main.stderr.count("error: ") == 1
        assert not other.stdout + other.stderr


@pytest.mark.parametrize("what", ["texts", slow("tasks")])
def test_three_processes_measure_what_one_does(sleb, text_file, tmp_path, monkeypatch, what):
    monkeypatch.setattr(texts, "TOKENS_PER_PART", 128)
    model = save_model(tmp_path / "long", llama_config(4, max_position_embeddings=512))
    options = {
        "texts": ["--perplexity", text_file, "--sequence-length", 64, "--max-windows", 13],
        "tasks": ["--tasks", "sleb_lists,sleb_sums", "--limit", 13, "--batch-size", 2],
    }
    command = ["eval", model, "--blocks", "1,2", *options[what], "-q"]
    sleb(*command, "-o", "one.json")
    all_well(together(3, *command, "-o", "three.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --nproc-per-node 2 --master-port",
        "accelerate.commands.accelerate_cli launch --cpu --num_processes 2 --main_process_port",
    ],
)
def test_launchers_start_the_processes(search, whole, tmp_path, launcher):
    expected = whole()
    words = ["-m", *launcher.split(), free_port(), "-m", "sleb_cli", *search, "-o", "plan.json"]
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert plan_bytes(tmp_path / "plan.json") == expected
    assert ended.stdout.count("wrote plan.json") == ended.stderr.count("step 1 of 3") == 1
