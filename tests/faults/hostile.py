"""Runs the program on hostile files, many cases in one fork, and says of each how that ended.

A case is a folder in which files are replaced, and a command. It runs within limits of memory and time; one that ends
its process is known by what the process last wrote, and the rest of the batch goes on in another.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from faults.program import Program, wrong_ending

SECRET = b"canary-that-must-stay-where-it-is-"
"""What the files outside hold, so that it is found wherever it goes."""
PLACE = "@PLACE@"
"""Stands in a case for the folder that holds `model`, `outside` and what the program writes."""
MEMORY, CLOCK_SECONDS, BATCH = 2 << 30, 300, 50
OWN = ("cache", "hub", "code", "tmp")
OUTPUT = re.compile(rf"(\.?out|{'|'.join(OWN)})([./]|$)")
NEW = re.compile(rf"{OUTPUT.pattern}|plan\.(eval|bench)\.")
"""Folders of its own, and what else a case may change, or make."""


PIPE, FOLDER = os.mkfifo, os.mkdir
"""Contents that are no files: a named pipe that nobody writes to, and an empty folder."""


def _make_link(target, path):
    path.symlink_to(target.replace(PLACE, str(Path.cwd())))


def _make_sparse(head, size, path):
    path.write_bytes(head)
    os.truncate(path, size)


link, sparse = partial(partial, _make_link), partial(partial, _make_sparse)
"""Contents: a symbolic link to a target; a file of a head and a size that takes no room on the disk."""


@dataclass(frozen=True)
class Case:
    """A command in a copy of `base`, in which these files are replaced or, with None, missing.

    Attributes:
        words: the command.
        files: the content of each, bytes or what makes it.
        base: a folder.
        codes: the exit codes that fit.
        says: a pattern that must be found on the screen.
        seconds: how long it may take a processor.
    """

    words: tuple[str, ...]
    files: dict[str, Any]
    base: Path
    codes: Sequence[int] = range(10)
    says: str = ""
    seconds: int = 10


class Outcome(NamedTuple):
    """How a case ended: its exit code, or that of its process, what it said, and what is wrong, if anything."""

    case: Case
    code: int | None
    said: str
    wrong: list[str]


def run_cases(program: Program, cases: Sequence[Case], place: Path) -> list[Outcome]:
    """Run all cases and return how each ended. One that fails in a batch counts only if it also fails alone."""
    batches = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
    outcomes = [outcome for batch in batches for outcome in _run_batch(program, batch, place)]
    return [_run_batch(program, [each.case], place)[0] if each.wrong else each for each in outcomes]


def require_well(outcomes: Sequence[Outcome]) -> None:
    """Require that nothing is wrong with any case."""
    bad = [(each.wrong, str(each.case)[:3000], each.said[-1500:]) for each in outcomes if each.wrong]
    assert not bad, f"{len(bad)} of {len(outcomes)} cases: {bad[:20]}"


def _run_batch(program: Program, cases: Sequence[Case], place: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while rest := cases[len(outcomes) :]:
        folder = Path(tempfile.mkdtemp(dir=place))
        (folder / "cases").write_bytes(pickle.dumps(rest))
        limits = {"memory": MEMORY, "seconds": CLOCK_SECONDS * (len(rest) + 1)}
        finished = program.run(cwd=folder, **limits, before=(_be_the_program, folder), codes=None)
        told = folder / "outcomes"
        done = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        outcomes += [Outcome(case, *each) for case, each in zip(rest, done, strict=False)]
        if len(done) < len(rest):
            code = finished.exit_code  # of SIGALRM or SIGPROF, if it took too long
            outcomes.append(Outcome(rest[len(done)], code, finished.stderr, [f"ended the process with {code}"]))
        shutil.rmtree(folder)
    return outcomes


# What follows runs in the fork.


def _be_the_program(folder: Path) -> None:
    """Run the cases in `folder`, write after each how it ended, and end."""
    with (folder / "outcomes").open("a", buffering=1) as told:
        for number, case in enumerate(pickle.loads((folder / "cases").read_bytes())):
            place = folder / "deep" / str(number)
            shutil.copytree(case.base, place, symlinks=True)
            os.chdir(place)
            for name, content in case.files.items():
                _write(place / name, content)
            # These end the process, whatever it does: no Python code needs to run for that.
            signal.setitimer(signal.ITIMER_PROF, case.seconds)
            signal.alarm(CLOCK_SECONDS)
            told.write(json.dumps(_run_case(place, case)) + "\n")
            os.chdir(folder)
            shutil.rmtree(place)
    raise SystemExit(0)


def _write(path: Path, content: Any) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content.replace(PLACE.encode(), os.fsencode(Path.cwd())))


def _run_case(place: Path, case: Case) -> tuple[int, str, list[str]]:
    from sleb_cli.__main__ import main

    for name, value in zip(("SLEB_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TMPDIR"), OWN, strict=True):
        (place / value).mkdir()
        os.environ[name] = str(place / value)
    tempfile.tempdir = None
    before = _content(place)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    wrong, trace, code = [], "", 1
    with _touched(place / "outside") as touched:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(list(case.words))
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            wrong = [f"a traceback of {type(error).__name__}"]
        wrong += [f"touched outside: {each}" for each in touched()]
    printed, said = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    wrong += _wrong_words(code, said, printed, case)
    after = _content(place)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    wrong += [f"{name} is new or another" for name in changed if not (OUTPUT if name in before else NEW).match(name)]
    wrong += [f"{name} holds what was outside" for name in changed if after.get(name) == "secret"]
    wrong += [f"{path} is new" for path in place.parent.iterdir() if path != place]
    if code and (place / "out").exists():
        wrong.append("a checkpoint was left by a run that failed")
    return code, trace or said, wrong


def _wrong_words(code: int, said: str, printed: str, case: Case) -> Iterator[str]:
    """Yield what is wrong with what a user reads."""
    yield from wrong_ending(code, said, case.codes)
    if not re.search(case.says, said + printed):
        yield f"{case.says!r} is not said: {printed}"
    if len(said) > 5000:
        yield f"{len(said)} characters"
    if re.search(r"[^\n\x20-\x7e\x85\xa0-\u2029\u2030-\u2065\u206a-\ud7ff\ue000-\U0010ffff]", said + printed):
        yield "control characters"
    if SECRET.decode() in printed + said:
        yield "what was outside is on the screen"


def _content(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a folder, "secret" for one that holds the canary; links are not followed."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and path.stat().st_size <= 64 << 20:
            data = path.read_bytes()
            found[name] = "secret" if SECRET in data else hashlib.md5(data).hexdigest()
        else:
            found[name] = f"{path.stat().st_mode} {path.is_file() and path.stat().st_size}"
    return found


@contextlib.contextmanager
def _touched(folder: Path) -> Iterator[Any]:
    """Ask the kernel which files of a folder are opened, read or changed, by whatever name and library."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    events = 0xFE7  # all but that a file was closed
    assert libc.inotify_add_watch(fd, os.fsencode(folder), events) >= 0, os.strerror(ctypes.get_errno())

    def names() -> set[bytes]:
        with contextlib.suppress(BlockingIOError):
            return set(re.findall(rb"[\w.-]{3,}", os.read(fd, 1 << 20)))  # what lies there, between numbers
        return set()

    yield names
    os.close(fd)
