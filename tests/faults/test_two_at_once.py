"""Two runs on one output, one cache or one journal: both end well or one is refused, and what is there is whole."""

import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from conftest import calibration
from faults.conftest import counts
from gguf_models import write_llama_gguf

OUTPUT = 8


@pytest.fixture
def place(program, tiny_llama, text_file, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "text.txt").write_text("".join(lines[:40]))
    (tmp_path / "other.txt").write_text("".join(lines[20:60]))
    write_llama_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "begin").mkdir()
    run = program.run(*search("plan.json", remove=2), cwd=tmp_path / "begin")
    assert run.exit_code == 0, run.stderr
    return tmp_path


def search(output, *, model="../model", remove=1, more=()):
    text = calibration("../text.txt", samples=4)
    return ("search", model, "--remove", remove, *text, "--sample-tokens", 4, "-o", output, *more)


def evaluate(text, *more):
    return ("eval", "plan.json", "--perplexity", f"../{text}.txt", "--sequence-length", 32, "--max-windows", 4, *more)


APPLY = ("apply", "plan.json", "-o", "small")
HEAL = ("apply", "plan.json", "-o", "small", "--heal", "--heal-tokens", 512, *calibration("../text.txt", samples=8))
# What two runs do, whether both must end well, and how the second one is tried again if it was refused.
PAIRS = {
    "apply": (APPLY, APPLY, False),
    "apply --force": ((*APPLY, "--force"), (*APPLY, "--force"), False),
    "apply --heal": (HEAL, HEAL, False),
    "apply gguf": (
        ("apply", "../tiny.gguf", "--blocks", "2,3", "-o", "small.gguf"),
        ("apply", "../tiny.gguf", "--blocks", "2,3", "-o", "small.gguf"),
        False,
    ),
    "search": (search("new.json"), search("new.json"), False),
    "search --force": (search("new.json", more=["--force"]), search("new.json", more=["--force"]), False),
    "search --resume": (search("new.json", more=["--resume"]), search("new.json", more=["--resume"]), False),
    "one cache": (search("a.json", model="../tiny.gguf"), search("b.json", model="../tiny.gguf"), True),
    "one result": (evaluate("text", "-o", "scores.json"), evaluate("text", "-o", "scores.json"), False),
    "results of one plan": (evaluate("text"), evaluate("other"), True),
}


def begin(place):
    for name in ("work", "cache"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "begin", place / "work")


def files(place):
    return {
        str(path.relative_to(place)): re.sub(rb'"(started|seconds)": .*', b"", path.read_bytes())
        for name in ("work", "cache")
        for path in sorted((place / name).rglob("*"))
        if path.is_file()
    }


def after_computing_for(running, seconds):
    """Wait until a run has used its processor for so long, or has ended."""
    stat = Path(f"/proc/{running.pid}/stat")
    while running.is_alive:
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return
        if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return
        os.sched_yield()


FIRST = ("apply", "search", "one cache", "results of one plan")


@counts(1, 20)
@pytest.mark.parametrize(
    "name", [*FIRST, *(pytest.param(name, marks=pytest.mark.faults) for name in PAIRS if name not in FIRST)]
)
def test_two_runs_never_spoil_what_one_of_them_makes(program, place, name, count, tried):
    first, second, both = PAIRS[name]
    environment = {"SLEB_CACHE": str(place / "cache")}

    def start(words):
        return program.start(*words, cwd=place / "work", environment=environment)

    begin(place)
    used = []
    for words in (first, second) if both else (first,):
        running = start(words)
        finished = running.wait()
        assert finished.exit_code == 0, finished.stderr
        used.append(finished.seconds)
    whole = files(place)
    ends = Counter()
    for seed in range(count):
        delay = random.Random(seed).choice([0, random.Random(seed).uniform(0, 0.5)])
        begin(place)
        one = start(first)
        after_computing_for(one, delay)
        two = start(second)
        runs = [one.wait(), two.wait()]
        case = f"{name}, seed {seed}: {[(run.exit_code, run.stderr) for run in runs]}"
        codes = sorted(run.exit_code for run in runs)
        ends[str(codes)] += 1
        assert codes in ([0, 0], [0, OUTPUT]), case
        assert not both or codes == [0, 0], case
        for run in runs:
            assert "Traceback" not in run.stderr, case
            assert len(re.findall("^error: ", run.stderr, re.MULTILINE)) == bool(run.exit_code), case
        found = files(place)
        assert found.keys() == whole.keys(), case
        different = [path for path in whole if found[path] != whole[path] and not path.endswith(".eval.json")]
        assert not different, case
        if name == "results of one plan":
            texts = json.loads(found["work/plan.eval.json"])["texts"]
            assert {text["text"] for text in texts} == {"../text.txt", "../other.txt"}, case
    print(f"\n{name}: {dict(ends)}")
    tried("pairs of runs at once", count)
