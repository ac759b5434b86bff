"""Asked to end, or with nobody left who reads, the program ends politely and loses nothing that was
done.
"""

import os
import signal

import pytest

from conftest import calibration, evaluation
from faults.arrangements import cleaning_up_for_long, stopping_at, without_readers
from faults.program import STOP, Calls, Fault, require

CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
SHORT = ["--samples", 4, "--sequence-length", 16, "--sample-tokens", 2]


@pytest.fixture
def commands(tiny_llama, llama_plan, text_file):
    """Commands that write to the disk, by their verb, each with the words of its log at which it is
    in the middle.
    """
    # The journal and the cache are kept on purpose; all else must be whole or absent.
    few = ("--remove", 3, "--batch-size", 1, *calibration(text_file, 8, 32))
    searching = ("search", tiny_llama, *few, "-o", "new.json")
    applying = ("apply", llama_plan, "-o", "new")
    evaluating = ("eval", llama_plan, *evaluation(text_file), "-o", "new.json")
    return {
        "search": (searching, "Search: "),
        "apply": (applying, "Writing weights"),
        "apply, proving": (applying, "Proving the checkpoint"),
        "eval": (evaluating, "Loading"),
    }


@pytest.fixture
def ended(program, commands, tmp_path):
    """Start a command, hold it where its log says that it is in the middle, send signals, and let
    it end.
    """

    def run(verb, *numbers, ignored=()):
        words, moment = commands[verb]
        running = program.start(*words, cwd=tmp_path, before=(stopping_at, moment, ignored))
        return running.when_stopped(lambda: running.send(*numbers))

    return run


def left():
    return sorted(name for name in os.listdir() if name.startswith((".new", "new")))


ENDS = [
    ("search", signal.SIGTERM, 1),
    ("search", signal.SIGHUP, 1),
    ("search", signal.SIGINT, 1),
    ("apply", signal.SIGTERM, 5),
    ("apply", signal.SIGHUP, 5),
    ("apply, proving", signal.SIGTERM, 1),
    ("eval", signal.SIGINT, 1),
]


@pytest.mark.parametrize(("verb", "number", "times"), ENDS)
def test_a_signal_ends_a_command_and_it_cleans_up(ended, verb, number, times):
    """Nor do more signals disturb the clean-up."""
    said = require(ended(verb, *[number] * times), (CODES[number],)).stderr
    assert "Exception ignored" not in said
    assert left() in ([], ["new.json.journal"])
    assert ("--resume" in said) == (verb == "search")


def test_under_nohup_a_command_goes_on(ended):
    require(ended("apply", signal.SIGHUP, ignored=[signal.SIGHUP]))
    assert left() == ["new"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_ends_at_once(program, commands, tmp_path, first):
    words, _ = commands["apply"]
    first_write = Fault(tmp_path / ".new.partial" / "new", 1, STOP, Calls.WRITE)
    arranged = {"fault": first_write, "before": (cleaning_up_for_long,)}
    running = program.start(*words, cwd=tmp_path, **arranged)
    running.wait_until_stopped()
    running.send(first, signal.SIGCONT)
    while "cleaning up" not in running.written("stderr"):
        assert not running.ends_within(0.005), "it ended before it cleaned up"
    running.send(*[signal.SIGINT] * (1 if first == signal.SIGINT else 2))
    require(running.wait(), (-signal.SIGINT, 130))
    assert left() == [".new.partial", ".new.partial.lock"]
    program.run(*words, cwd=tmp_path)
    assert left() == ["new"]


@pytest.mark.parametrize(
    ("verb", "streams", "more"),
    [
        ("search", (1,), [*SHORT, "--json"]),
        ("apply", (1, 2), []),
        ("eval", (1,), ["--json"]),
    ],
)
def test_without_readers_the_result_is_still_written(
    program, commands, tmp_path, verb, streams, more
):
    words, _ = commands[verb]
    arranged = {"cwd": tmp_path, "before": (without_readers, *streams)}
    result = program.run(*words, *more, codes=[128 + signal.SIGPIPE], **arranged)
    assert "Exception ignored" not in result.stderr
    assert left() == [words[-1]]
