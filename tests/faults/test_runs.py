"""Runs that are killed, whose disk fails, whose model changes, or that are two: a result is whole
or absent.

The table says what is injected into which command. A run that nothing disturbs is traced first, so
that each of its calls to the file system can be the one at which it happens.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from faults.conftest import often
from faults.place import APPLY, APPLY_GGUF, COMMANDS, HEAL, delivered, evaluate, search
from faults.program import KILL, STOP, Calls, Fault, require

MODEL = 4
OUTPUT = 8
PROOF = 9
WRITES = Calls.CHANGES & ~Calls.REMOVE
WRITTEN = re.compile(r"/work/\..*\.partial/.*\.(safetensors|json|gguf)$")


def kill(place, name, number, rng):
    """Kill a command at a call or at a time; what is there is whole, and given again it ends as if
    undisturbed.
    """
    calls = place.undisturbed(name)[0]
    place.reset()
    if number % 2:
        running = place.launch(COMMANDS[name])
        kill_some(running, rng)
    else:
        fault = Fault(place.folder, rng.randint(1, len(calls)), KILL)
        running = place.launch(COMMANDS[name], fault=fault)
    ended = [each.wait() for each in running]
    wrong = place.wrong(name, done=False, may_leave=True)
    assert not wrong, (wrong, [each.stderr for each in ended])
    if any(each.exit_code for each in ended):
        place.again(name, number)


def kill_some(running, rng):
    """Kill one process after some time, or all; the others end as a launcher ends them."""
    running[0].ends_within(rng.uniform(0, 0.5))
    for each in rng.choice([running, *([each] for each in running)]):
        each.send(signal.SIGKILL)
    for each in running:
        if not each.ends_within(1):
            each.send(signal.SIGTERM)


def fail(place, name, number, rng):
    """Fill the disk, or let a write fail, or a read of what was written: there is a whole result,
    or one sentence.
    """
    command = COMMANDS[name]
    is_full = number % 2 == 0
    error = errno.ENOSPC if is_full else errno.EIO
    sorts = WRITES if is_full else WRITES | Calls.READS
    calls = [call for call in place.undisturbed(name)[0] if call.sort & sorts]
    naming = []
    ours = []
    for at, call in enumerate(calls):
        if call.sort is Calls.RENAME and call.path.endswith(command.output):
            naming.append(at)
        if call.sort & WRITES or WRITTEN.search(call.path):
            ours.append(at)
    at = rng.choice(ours) if number else naming[0]
    call = calls[at]
    place.reset()
    fault = Fault(place.folder, at + 1, error, sorts, lasting=is_full)
    (running,) = place.launch(command, fault=fault)
    finished = running.wait()
    case = (call, error, finished.stderr)
    done = finished.exit_code == 0
    wrong = place.wrong(name, done=done, may_leave=".partial.old" in call.path)
    assert not wrong, (case, wrong)
    if not done:
        require(finished, {OUTPUT} if is_full else {MODEL, OUTPUT, PROOF})
        (sentence,) = re.findall(r"^error: .*", finished.stderr, re.MULTILINE)
        places = (command.output, "cache", "work", "tiny.gguf", "proof", str(place.folder / "tmp"))
        assert any(known in sentence for known in places), case
        # The place is claimed once before all work, too.
        is_saving = "Loading" in finished.stderr and f"/.{command.output}" in call.path
        if command.words[0] in ("search", "eval") and is_saving and finished.exit_code == OUTPUT:
            json.loads(finished.stdout)
    if place.files() != place.undisturbed(name)[1]:
        place.again(name, case)


def edit(path):
    """Change a quarter of the bytes in place, without a change of size."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size * 2 // 3)
        file.write(bytes(size // 4))


def replace(path):
    """Put another file in its place, as programs do that save models."""
    aside = path.with_name("aside")
    shutil.copy(path, aside)
    edit(aside)
    aside.replace(path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def change(place, name, number, rng):
    """Change the model while it is read: that is named and nothing delivered, or it came too late
    to matter.
    """
    command = COMMANDS[name]
    calls, whole = place.undisturbed(name)
    source = place.folder / ("tiny.gguf" if "gguf" in name else "model/model.safetensors")
    do = rng.choice([edit, replace, truncate])
    reads = [at for at, call in enumerate(calls, start=1) if f"/{source.name}" in call.path]
    # Most changes come just before the file is read once more, after its fingerprint was taken.
    if number % 3 == 2:
        at = rng.randint(reads[0], len(calls))
    else:
        at = rng.choice(reads[len(reads) // 2 :])
    place.reset()
    (running,) = place.launch(command, fault=Fault(place.folder, at, STOP))
    finished = running.when_stopped(lambda: do(source))
    found = delivered(command, place.files())
    case = (do, calls[at - 1], finished.stderr)
    if finished.exit_code:
        assert found == delivered(command, place.start), case
        is_cut_off_map = do is truncate and finished.exit_code == -signal.SIGBUS
        if not is_cut_off_map:
            require(finished, (3, 4))
    elif found != delivered(command, whole):  # it only began to read when the file had changed
        shutil.rmtree(place.work)
        shutil.copytree(place.folder / "begin", place.work)
        place.run(*command.words)
        assert found == delivered(command, place.files()), case


ON_A_DISK = [name for name in COMMANDS if "processes" not in name]
READING = ("apply", "apply gguf", "search", "search gguf", "eval")
INJECTED = [
    # What is injected, into which commands, and how often with `-m faults`; once in every run.
    (kill, COMMANDS, 10),
    (fail, ON_A_DISK, 15),
    (change, READING, 5),
]
CASES = []
for inject, names, many in INJECTED:
    for name in names:
        CASES.append(pytest.param(inject, name, 1, id=f"{inject.__name__} {name}"))
        CASES.append(
            pytest.param(
                inject,
                name,
                many,
                id=f"{inject.__name__} {name} {many}",
                marks=pytest.mark.faults,
            )
        )


@pytest.mark.parametrize(("inject", "name", "count"), CASES)
def test_a_result_is_whole_or_absent(place, inject, name, count):
    for number in range(count):
        inject(place, name, number, random.Random(f"{name} {number}"))


@pytest.mark.parametrize("name", often(ON_A_DISK, ["search", "apply", "apply gguf"]))
def test_a_file_is_flushed_before_it_gets_its_name(place, name):
    """Whatever was written is flushed before the file or folder that it is in is renamed, and the
    new name after it.
    """
    calls = [(call.sort, Path(call.path)) for call in place.undisturbed(name)[0]]
    names = []
    for at, (sort, path) in enumerate(calls):
        if sort is Calls.RENAME and "/." not in str(path):
            names.append(path.name)
            require_flushed(calls, at, path)
    assert COMMANDS[name].output in names


def require_flushed(calls, at, path):
    """Check what was written before a call gave it this name, and that the name is flushed."""
    beside = str(path.parent / f".{path.name}.")
    written = {}
    for number, (sort, file) in enumerate(calls[:at]):
        if sort is Calls.WRITE and str(file).startswith(beside) and is_part(file):
            written[file] = number
    assert written, path
    for file, last in written.items():
        is_flushed = (Calls.SYNC, file) in calls[last:at]
        assert is_flushed, f"{file} is not flushed before {path} has its name"
    assert (Calls.SYNC, path.parent) in calls[at:], f"the name {path} is not flushed"


def is_part(file):
    """Whether a file that is written aside is part of what gets a name: not what a proof writes and
    deletes.
    """
    for part in file.parts:
        if part.startswith((".again", ".tmp")) or part.endswith(".checkpoint"):
            return False
    return True


# What both runs do, or what each does, and then both must end well.
PAIRS = {
    "apply": [APPLY],
    "apply --heal": [HEAL],
    "apply gguf": [APPLY_GGUF],
    "search": [search()],
    "one cache": [search(model="../tiny.gguf", output=f"{name}.json") for name in "ab"],
    "results of one plan": [evaluate(), evaluate(text="other")],
}


@pytest.mark.parametrize("count", often([1, 5], [1]))
@pytest.mark.parametrize("name", often(PAIRS, ["apply", "search", "one cache"]))
def test_two_runs_do_not_spoil_each_others_results(place, name, count):
    words = PAIRS[name]
    place.reset()
    for each in words:
        place.run(*each)
    whole = place.files()
    for seed in range(count):
        place.reset()
        rng = random.Random(seed)
        one = place.program.start(*words[0], **place.here)
        one.ends_within(rng.choice([0, rng.uniform(0, 0.5)]))
        two = place.program.start(*words[-1], **place.here)
        allowed = (0,) if len(words) > 1 else (0, OUTPUT)
        codes = [require(run.wait(), allowed).exit_code for run in (one, two)]
        assert 0 in codes, seed
        found = place.files()
        assert found == whole, seed
        if name == "results of one plan":
            kept = (place.work / "plan.results").iterdir()
            texts = {json.loads(file.read_text())["texts"][0]["text"] for file in kept}
            assert texts == {"../text.txt", "../other.txt"}
