"""Every call to the file system meets every error that it can: a result is whole, or there is a sentence and no result.

A run of each command is traced. Then each of its calls fails in turn, with errors that take turns, so that each call
meets one and each sort of call meets all.
"""

import contextlib
import errno
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.conftest import counts, often
from faults.place import COMMANDS, Place
from faults.program import SHORT, STOP, Call, Calls, Fault, require

FULL, DEAD = "full from then on", "dead from then on"
LASTING = {FULL: (errno.ENOSPC, Calls.CHANGES & ~Calls.REMOVE), DEAD: (errno.EIO, Calls.ALL)}
ERRORS = {
    Calls.OPEN_READ: ["EIO", "EACCES", DEAD],
    Calls.READ: ["EIO", "SHORT", "ESTALE", DEAD],
    Calls.OPEN_WRITE: ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", FULL, DEAD],
    Calls.WRITE: ["ENOSPC", "SHORT", "EIO", "EDQUOT", FULL, DEAD],
    Calls.SYNC: ["EIO", "ENOSPC", "EDQUOT", DEAD],
    Calls.RENAME: ["ENOSPC", "EIO", "EDQUOT", "EROFS", DEAD],
    Calls.MAKE: ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", FULL, DEAD],
    Calls.REMOVE: ["EIO", "EROFS", "EACCES", DEAD],
}
PLAN, MODEL, DATA, OUTPUT = 3, 4, 5, 8
ON_A_DISK = (
    "search", "search --stream", "search gguf", "bench --estimate", "apply", "apply gguf", "apply --recover",
    "apply --heal", "eval", "export", "report",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call that fails, the error, and the fault that makes it fail."""

    call: Call
    error: str
    fault: Fault


def cases(folder: Path, calls: tuple[Call, ...]) -> Iterator[Case]:
    """Let each of these calls fail once, with each error in turn that its sort can meet."""
    turns = {sort: in_turns(errors) for sort, errors in ERRORS.items()}
    for place, call in enumerate(calls):
        error = next(turns[call.sort])
        what, sorts = LASTING.get(error, (SHORT if error == "SHORT" else getattr(errno, error, 0), call.sort))
        at = sum(bool(other.sort & sorts) for other in calls[: place + 1])
        yield Case(call, error, Fault(folder, at, what, sorts, lasting=error in LASTING))


def in_turns(errors: list[str]) -> Iterator[str]:
    """Yield all errors, and then all of them again, each time in another order."""
    rng = random.Random(0)
    while True:
        yield from rng.sample(errors, len(errors))


@counts(1, 100_000)
@pytest.mark.parametrize("name", ON_A_DISK)
def test_a_call_that_fails_costs_a_sentence_at_most(place, name, count, tried):
    every = list(cases(place.folder, place.undisturbed(name)[0]))
    step = max(1, len(every) // count)
    # In every run, one is that which gives the output its name.
    naming = [
        case for case in every if case.call.sort is Calls.RENAME and case.call.path.endswith(COMMANDS[name].output)
    ]
    chosen = [*every[random.Random(name).randrange(step) :: step], naming[-1]]
    for case in chosen:
        place.reset()
        (running,) = place.launch(COMMANDS[name], fault=case.fault)
        finished = running.wait()
        undeletable = case.error == DEAD or case.call.sort is Calls.REMOVE
        wrong = list(place.wrong(name, done=finished.exit_code == 0, may_leave=undeletable))
        assert not wrong, (case, finished.stderr, wrong)
        if finished.exit_code:
            require_a_fitting_error(COMMANDS[name], case, finished)
        place.again(name, case)
    tried("calls to the file system that fail", len(chosen))


def require_a_fitting_error(command, case, finished):
    """Require the exit code and the name of what failed, and a result on stdout where it cannot be saved."""
    require(finished, exit_codes(case))
    said = (case, finished.stderr)
    assert case.error != "SHORT", said
    if case.error not in LASTING:
        (error,) = re.findall(r"^error: .*", finished.stderr, re.MULTILINE)
        assert any(name in error for name in names_of(command, case.call.path)), said
    is_done = "Loading" in finished.stderr  # the place is claimed once before all work, too
    if command.printed and is_done and f"/.{command.output}" in case.call.path and finished.exit_code == OUTPUT:
        json.loads(finished.stdout)


def exit_codes(case: Case) -> set[int]:
    """Return the exit codes that fit a failure."""
    path = os.path.normpath(case.call.path)
    if case.error == DEAD:  # whatever is asked of the disk next
        return {PLAN, MODEL, DATA, OUTPUT}
    if case.call.sort not in Calls.READS:
        return {OUTPUT}
    if path.startswith("/work/plan.json.journal") or path == "/work/plan.json" or ".recovery" in path:
        return {PLAN}
    codes = {"/text.txt": {DATA}, "/model": {MODEL}, "/tiny.gguf": {MODEL}, "/cache": {MODEL, OUTPUT}}
    return next((codes[start] for start in codes if path.startswith(start)), {OUTPUT})


def names_of(command, path: str) -> set[str]:
    """Return the names of which one must be in the sentence: of the file or its folder, as the user knows them."""
    parts = {re.sub(r"^\.(.*?)(\.\w{8})?(\.partial|\.replaced)?$", r"\1", part) for part in Path(path).parts}
    converted = {"tiny.gguf"} if path.startswith("/cache") else set()
    return parts - {"/", "work", "cache"} | converted or {"cache", "work", command.output}


@pytest.mark.parametrize("name", ON_A_DISK)
def test_what_is_given_its_name_is_on_the_disk(place, name):
    """Whatever was written is flushed before the file or folder that it is in is renamed, and the new name after it."""
    calls = [(call.sort, Path(call.path)) for call in place.undisturbed(name)[0]]
    named = [(at, path) for at, (sort, path) in enumerate(calls) if sort is Calls.RENAME and "/." not in str(path)]
    assert any(path.name == COMMANDS[name].output for _, path in named)
    for at, path in named:
        beside = re.compile(re.escape(f"{path.parent}/.{path.name}.".replace("//", "/")))
        written = {
            file: place
            for place, (sort, file) in enumerate(calls[:at])
            if sort is Calls.WRITE and beside.match(str(file)) and is_kept(file)
        }
        assert written, path
        for file, last in written.items():
            assert (Calls.SYNC, file) in calls[last:at], f"{file} is not flushed before {path} has its name"
        assert (Calls.SYNC, path.parent) in calls[at:], f"the name {path} is not flushed"


def is_kept(file: Path) -> bool:
    """Whether a file that is written aside is part of what gets a name: not what a proof writes and deletes."""
    return not any(part.startswith((".again", ".tmp")) or part == "checkpoint" for part in file.parts)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB, where the user may mount one."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@counts(1, 20)
@pytest.mark.parametrize("name", often(["apply", "apply gguf", "search"], ["apply"]))
def test_a_disk_that_others_fill_meanwhile(program, small_disk, name, count, tried):
    place = Place(program, small_disk)

    def fill():
        with contextlib.suppress(OSError), (small_disk / "of others").open("wb", buffering=0) as others:
            while others.write(bytes(4096)):
                pass

    calls, _ = place.undisturbed(name)
    writes = [at for at, call in enumerate(calls, start=1) if call.sort in Calls.WRITE | Calls.MAKE]
    chosen = random.Random(name).sample(writes, min(count, len(writes)))
    for at in chosen:
        place.reset()
        (running,) = place.launch(COMMANDS[name], fault=Fault(small_disk, at, STOP))
        finished = require(running.when_stopped(fill), (0, OUTPUT))
        (small_disk / "of others").unlink()
        assert list(place.wrong(name, done=finished.exit_code == 0, may_leave=False)) == [], finished.stderr
        assert not finished.exit_code or re.search("(?im)^error: .*(full|no space)", finished.stderr), finished.stderr
        place.again(name, calls[at - 1])
    tried("disks that others fill", len(chosen))
