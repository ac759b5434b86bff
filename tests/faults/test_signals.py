"""Asked to end, or with nobody left who reads, the program ends politely and loses nothing that was done."""

import importlib
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from conftest import calibration, evaluation
from faults.program import STOP, Calls, Fault

CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
BROKEN_PIPE = 141
SHORT = ["--samples", 4, "--sequence-length", 16, "--sample-tokens", 2]


@pytest.fixture
def commands(tiny_llama, llama_plan, text_file, tmp_path):
    """Commands that write to the disk, by their verb, each with the words of its log at which it is in the middle."""
    # The journal and the cache are kept on purpose; all else must be whole or absent.
    searching = ["search", tiny_llama, "--remove", 3, "--batch-size", 1, *calibration(text_file, 40, 64)]
    return {
        "search": ([*searching, "-o", "new.json"], "Search: "),
        "apply": (["apply", llama_plan, "-o", "new"], "Writing weights"),
        "apply, proving": (["apply", llama_plan, "-o", "new"], "proven: "),
        "eval": (["eval", llama_plan, *evaluation(text_file), "-o", "new.json"], "Loading"),
    }


def start_and_hold(program, moment, *words, **options):
    """Start a run, and hold it where its log says `moment`."""
    running = program.start(*called(stopping_at), moment, *words, **options)
    assert running.wait_until_stopped(), f"it ended before it said {moment!r}"
    return running


def go_on_with(running, number):
    """Let a run that is held go on, and send it this signal first."""
    running.send(number)
    running.send(signal.SIGCONT)


def left(tmp_path):
    return sorted(name for name in os.listdir(tmp_path) if name.startswith((".new", "new")))


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("verb", ["search", "apply", "apply, proving", "eval"])
def test_a_request_to_end_is_followed_and_cleaned_up_after(program, commands, tmp_path, verb, number):
    words, moment = commands[verb]
    running = start_and_hold(program, moment, *words, cwd=tmp_path)
    go_on_with(running, number)
    result = running.wait()
    assert result.exit_code == CODES[number], result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert left(tmp_path) in ([], ["new.json.journal"])
    if verb == "search":
        assert "rerun with --resume to continue" in result.stderr


def stopping_at(moment, *words):
    """Be the program, which stops once it has said `moment`."""
    said, write = [], sys.stderr.write

    def watched(text):
        count = write(text)
        said.append(text)
        if moment in "".join(said):
            sys.stderr.write = write
            signal.raise_signal(signal.SIGSTOP)
        return count

    sys.stderr.write = watched
    be_the_program(*words)


def ignoring_sighup(*words):
    """Be the program as `nohup` starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping_at(*words)


def cleaning_up_for_long(*words):
    """Be the program, which says when it cleans up, and then takes its time."""
    atomic = importlib.import_module("sleb_cli.atomic")
    clear, now = atomic._clear, []

    def slowly(folder):
        if list(folder.glob("new/*")):
            print("cleaning up", file=sys.stderr)
            while not now:
                signal.pause()
        clear(folder)

    atomic._clear = slowly
    be_the_program(*words)


def be_the_program(*words):
    sys.argv = ["sleb", *words]
    importlib.import_module("sleb_cli.__main__").run()


def called(function):
    return ["call", f'["{function.__module__}", "{function.__qualname__}"]']


def test_under_nohup_it_goes_on(program, commands, tmp_path):
    words, moment = commands["apply"]
    running = program.start(*called(ignoring_sighup), moment, *words, cwd=tmp_path)
    assert running.wait_until_stopped()
    go_on_with(running, signal.SIGHUP)
    assert running.wait().exit_code == 0
    assert left(tmp_path) == ["new"]


@pytest.mark.parametrize("first", CODES)
def test_a_second_ctrl_c_ends_at_once_and_the_next_run_cleans_up(program, commands, tmp_path, first):
    words, _ = commands["apply"]
    at_the_first_write = Fault(tmp_path / ".new.partial" / "new", 1, STOP, Calls.WRITE)
    running = program.start(*called(cleaning_up_for_long), *words, cwd=tmp_path, fault=at_the_first_write)
    assert running.wait_until_stopped()
    go_on_with(running, first)
    while "cleaning up" not in running.stderr():
        assert not running.ends_within(0.005), "it ended before it cleaned up"
    running.send(signal.SIGINT)
    if first != signal.SIGINT:
        running.send(signal.SIGINT)
    result = running.wait()
    assert result.exit_code in (-signal.SIGINT, 130)
    assert "Traceback" not in result.stderr
    assert left(tmp_path) == [".new.partial"]
    again = program.run(*words, cwd=tmp_path)
    assert again.exit_code == 0, again.stderr
    assert left(tmp_path) == ["new"]


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_do_not_disturb_the_clean_up(program, commands, tmp_path, again):
    words, moment = commands["apply"]
    running = start_and_hold(program, moment, *words, cwd=tmp_path)
    for _ in range(5):
        go_on_with(running, again)
    assert running.wait().exit_code == CODES[again]
    assert left(tmp_path) == []


def with_a_reader_that_goes(*words):
    """Be the program, whose stdout nobody reads any more."""
    ours, theirs = os.pipe()
    os.close(ours)
    os.dup2(theirs, 1)
    be_the_program(*words)


def with_readers_that_go(*words):
    """Be the program, none of whose streams anybody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    os.dup2(theirs, 2)
    with_a_reader_that_goes(*words)


@pytest.mark.parametrize(
    ("verb", "readers", "options"),
    [
        ("search", with_a_reader_that_goes, ["--json", *SHORT]),
        ("search", with_readers_that_go, SHORT),
        ("apply", with_a_reader_that_goes, []),
        ("apply", with_readers_that_go, []),
        ("eval", with_a_reader_that_goes, ["--json"]),
        ("eval", with_readers_that_go, []),
    ],
)
def test_what_nobody_reads_is_still_written_to_the_disk(program, commands, tmp_path, verb, readers, options):
    words = commands[verb][0]
    result = program.run(*called(readers), *words, *options, cwd=tmp_path)
    assert result.exit_code == BROKEN_PIPE, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert left(tmp_path) == [words[words.index("-o") + 1]]


def test_a_full_disk_behind_stdout_is_an_error(program, tmp_path):
    result = program.run(*called(into_a_full_disk), "--help", cwd=tmp_path)
    assert result.exit_code == 8
    assert "Cannot write the result to stdout: No space left on device." in result.stderr
    assert "Traceback" not in result.stderr


def into_a_full_disk(*words):
    """Be the program, whose stdout goes to a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    be_the_program(*words)


def on_a_terminal(*words):
    """Be the program on a terminal that goes away once the search has begun."""
    ours, theirs = pty.openpty()
    log = os.dup(2)
    for stream in (0, 1, 2):
        os.dup2(theirs, stream)
    os.close(theirs)
    sys.stdin = os.fdopen(0, closefd=False)

    def watch():
        seen = b""
        while b"evaluations" not in seen and b"step" not in seen:
            seen += os.read(ours, 1 << 16)
        os.write(log, b"the terminal goes")
        os.close(ours)

    threading.Thread(target=watch, daemon=True).start()
    be_the_program(*words)


def test_a_terminal_that_goes_takes_nothing_along(program, commands, tmp_path):
    """Without the signal, which a program that left its terminal does not get."""
    result = program.run(*called(on_a_terminal), *commands["search"][0], cwd=tmp_path, environment={"TERM": "xterm"})
    assert "the terminal goes" in result.stderr
    assert result.exit_code in (0, BROKEN_PIPE), result.stderr
    assert left(tmp_path) == ["new.json"]


@pytest.mark.parametrize(
    "shell", ["--help | true", "--help | head -1", "--version >&-", "plugins --json 2>&- | head -c 1"]
)
def test_in_a_shell(tmp_path, shell):
    """With streams as only a shell can make them."""
    line = f'set -o pipefail; "{sys.executable}" -m sleb_cli {shell}'
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode in (0, BROKEN_PIPE), result.stderr
    assert result.stderr == ""
