"""A clock that is wrong or goes back decides nothing, and no record says that something took less than no time."""

import json
import os
import re
import shutil

import pytest

from conftest import calibration
from faults.program import Limits
from gguf_models import write_llama_gguf

HOUR = 3600
TEXT = calibration("../text.txt", samples=4)
SEARCH = ("search", "../model", "--remove", 2, *TEXT, "--sample-tokens", 4, "-o", "plan.json")
EVAL = ("eval", "plan.json", "--perplexity", "../text.txt", "--sequence-length", 32, "--max-windows", 4)
COMMANDS = [
    (*SEARCH,),
    ("apply", "plan.json", "-o", "small"),
    (*EVAL, "-o", "scores.json"),
]
BENCH = ("bench", "plan.json", "--prompt-length", 8, "--new-tokens", 2, "-o", "speed.json")
TIMED = re.compile(rb'"(started|seconds)": .*')


@pytest.fixture
def place(tiny_llama, text_file, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(text_file.read_text().splitlines(keepends=True)[:40]))
    write_llama_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "work").mkdir()
    return tmp_path


def everything(place):
    """Return all files but those that say how fast this was."""
    return {
        str(path.relative_to(place)): TIMED.sub(b"", path.read_bytes())
        for name in ("work", "cache")
        for path in sorted((place / name).rglob("*"))
        if path.is_file() and path.name not in ("speed.json", "plan.bench.json")
    }


def durations(value):
    """Yield each number of seconds in a record."""
    if isinstance(value, list):
        for each in value:
            yield from durations(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            if "seconds" in name:
                yield from [number for number in (each if isinstance(each, list) else [each]) if number is not None]
            else:
                yield from durations(each)


@pytest.mark.parametrize("more", [[], pytest.param([BENCH], marks=pytest.mark.faults)], ids=["", "bench"])
def test_a_clock_that_goes_back_changes_nothing(program, place, more):
    found = []
    for clock in (0, HOUR):
        for name in ("work", "cache"):
            shutil.rmtree(place / name, ignore_errors=True)
            (place / name).mkdir()
        for words in [*COMMANDS, *more] if clock else COMMANDS:
            environment = {"SLEB_CACHE": str(place / "cache")}
            run = program.run(
                *words,
                cwd=place / "work",
                environment=environment,
                clock_goes_back=clock,
                limits=Limits(seconds=600),
            )
            assert run.exit_code == 0, run.stderr
        taken = [
            number
            for path in (place / "work").glob("*.json")
            for number in durations(json.loads(path.read_text()))
            if isinstance(number, int | float)
        ]
        assert taken
        assert min(taken) >= 0
        found.append(everything(place))
    assert found[0] == found[1]


@pytest.mark.parametrize("when", [2**32, pytest.param(0, marks=pytest.mark.faults)], ids=["2106", "1970"])
def test_the_dates_of_files_decide_nothing(program, place, when):
    environment = {"SLEB_CACHE": str(place / "cache")}

    def run(*words):
        for path in place.rglob("*"):
            os.utime(path, (when, when))
        finished = program.run(*words, cwd=place / "work", environment=environment)
        assert finished.exit_code == 0, finished.stderr
        return finished

    run(*SEARCH)
    run(*EVAL)
    scores = (place / "work" / "plan.eval.json").read_bytes()
    converted = run("search", "../tiny.gguf", "--remove", 1, *TEXT, "--sample-tokens", 4, "-o", "gguf.json")
    assert "Converting" in converted.stderr
    again = run("search", "../tiny.gguf", "--remove", 1, *TEXT, "--sample-tokens", 4, "-o", "gguf.json", "--force")
    assert "Converting" not in again.stderr
    run(*EVAL)
    assert TIMED.sub(b"", (place / "work" / "plan.eval.json").read_bytes()) == TIMED.sub(b"", scores)
    # What lies in the cache is used by what it holds: with another text of the same name and date, it is measured anew.
    (place / "text.txt").write_text((place / "text.txt").read_text()[::-1])
    run(*EVAL)
    assert TIMED.sub(b"", (place / "work" / "plan.eval.json").read_bytes()) != TIMED.sub(b"", scores)
