"""Every call to the file system meets every error that it can: a result is whole, or there is a sentence and no result.

A run of each command is traced. Then each of its calls fails in turn, with one of the errors that its sort can meet.
"""

import errno
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.conftest import counts
from faults.place import COMMANDS
from faults.program import SHORT, Call, Calls, Fault, require

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
OF_READS = {
    r"/work/plan\.json($|\.journal)|.*\.recovery": {PLAN}, "/text.txt": {DATA}, "/model|/tiny.gguf": {MODEL},
    "/cache": {MODEL, OUTPUT},
}  # fmt: skip
"""The exit codes for what cannot be read there; all else is of the output."""
ON_A_DISK = (
    "search", "search --stream", "search gguf", "apply", "apply gguf", "apply --recover",
    "apply --heal", "eval", "export", "report",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call that fails, the error, and the fault that makes it fail."""

    call: Call
    error: str
    fault: Fault


def cases(folder: Path, calls: tuple[Call, ...]) -> Iterator[Case]:
    """Let each of these calls fail once, with an error that its sort can meet."""
    rng = random.Random(0)
    for place, call in enumerate(calls):
        error = rng.choice(ERRORS[call.sort])
        what, sorts = LASTING.get(error, (SHORT if error == "SHORT" else getattr(errno, error, 0), call.sort))
        at = sum(bool(other.sort & sorts) for other in calls[: place + 1])
        yield Case(call, error, Fault(folder, at, what, sorts, lasting=error in LASTING))


@counts(1, 100_000)
@pytest.mark.parametrize("name", ON_A_DISK)
def test_a_call_that_fails_costs_a_sentence_at_most(place, name, count, tried):
    command, every = COMMANDS[name], list(cases(place.folder, place.undisturbed(name)[0]))
    step = max(1, len(every) // count)
    # In every run, one is that which gives the output its name.
    naming = [case for case in every if case.call.sort is Calls.RENAME and case.call.path.endswith(command.output)]
    chosen = [*every[random.Random(name).randrange(step) :: step], naming[-1]]
    for case in chosen:
        place.reset()
        (running,) = place.launch(command, fault=case.fault)
        finished = running.wait()
        undeletable = case.error == DEAD or case.call.sort is Calls.REMOVE
        wrong = list(place.wrong(name, done=finished.exit_code == 0, may_leave=undeletable))
        assert not wrong, (case, finished.stderr, wrong)
        if finished.exit_code:
            require_a_fitting_error(command, case, finished)
        if place.files() != place.undisturbed(name)[1]:
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
    # The place is claimed once before all work, too.
    is_saving = "Loading" in finished.stderr and f"/.{command.output}" in case.call.path
    if command.words[0] in ("search", "bench", "eval") and is_saving and finished.exit_code == OUTPUT:
        json.loads(finished.stdout)


def exit_codes(case: Case) -> set[int]:
    """Return the exit codes that fit a failure."""
    if case.error == DEAD:  # whatever is asked of the disk next
        return {PLAN, MODEL, DATA, OUTPUT}
    path = os.path.normpath(case.call.path)
    found = [codes for pattern, codes in OF_READS.items() if case.call.sort in Calls.READS and re.match(pattern, path)]
    return found[0] if found else {OUTPUT}


def names_of(command, path: str) -> set[str]:
    """Return the names of which one must be in the sentence: of the file or its folder, as the user knows them."""
    parts = {re.sub(r"^\.(.*?)(\.\w{8})?(\.partial|\.replaced)?$", r"\1", part) for part in Path(path).parts}
    converted = {"tiny.gguf", "cache"} if path.startswith("/cache") else set()
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
    return not any(part.startswith((".again", ".tmp")) or part.endswith(".checkpoint") for part in file.parts)
