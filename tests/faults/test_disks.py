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
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from conftest import calibration
from faults.conftest import counts
from faults.program import SHORT, STOP, Calls, Fault, Finished, Program
from gguf_models import write_llama_gguf

SORTS = {
    "open": Calls.OPEN_READ, "open_write": Calls.OPEN_WRITE,
    "read": Calls.READ, "pread": Calls.READ, "pread64": Calls.READ, "readv": Calls.READ, "preadv": Calls.READ,
    "preadv64": Calls.READ,
    "write": Calls.WRITE, "pwrite": Calls.WRITE, "pwrite64": Calls.WRITE, "writev": Calls.WRITE,
    "ftruncate": Calls.WRITE, "ftruncate64": Calls.WRITE, "fallocate": Calls.WRITE,
    "fsync": Calls.SYNC, "fdatasync": Calls.SYNC,
    "rename": Calls.RENAME, "renameat": Calls.RENAME, "renameat2": Calls.RENAME,
    "link": Calls.MAKE, "linkat": Calls.MAKE, "symlink": Calls.MAKE, "mkdir": Calls.MAKE, "mkdirat": Calls.MAKE,
    "unlink": Calls.REMOVE, "unlinkat": Calls.REMOVE, "rmdir": Calls.REMOVE,
}  # fmt: skip

FULL, DEAD = "full from then on", "dead from then on"
ERRORS: dict[Calls, tuple[str, ...]] = {
    Calls.OPEN_READ: ("EIO", "EACCES", DEAD),
    Calls.READ: ("EIO", "SHORT", "ESTALE", DEAD),
    Calls.OPEN_WRITE: ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", FULL, DEAD),
    Calls.WRITE: ("ENOSPC", "SHORT", "EIO", "EDQUOT", FULL, DEAD),
    Calls.SYNC: ("EIO", "ENOSPC", "EDQUOT", DEAD),
    Calls.RENAME: ("ENOSPC", "EIO", "EDQUOT", "EROFS", DEAD),
    Calls.MAKE: ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", FULL, DEAD),
    Calls.REMOVE: ("EIO", "EROFS", "EACCES", DEAD),
}
LASTING = {FULL: (errno.ENOSPC, Calls.CHANGES & ~Calls.REMOVE), DEAD: (errno.EIO, Calls.ALL)}

PLAN, MODEL, DATA, OUTPUT, PROOF = 3, 4, 5, 8, 9


@dataclass(frozen=True)
class Command:
    """A command in a folder `work`, and what becomes of its files there.

    Attributes:
        words: the command; `..` holds the model, the GGUF file and the text.
        output: what it delivers.
        replaces: whether an older output is there.
        again: what a second try adds.
        spare: patterns of files, in the folder `work` or `cache`, that only save time or keep a result once more.
        progress: patterns of files that a run which fails may leave for the next one.
        printed: whether a result that cannot be saved is printed.
    """

    words: tuple[object, ...]
    output: str
    replaces: bool = False
    again: tuple[str, ...] = ("--force",)
    spare: tuple[str, ...] = ()
    progress: tuple[str, ...] = ()
    printed: bool = False


TEXT = tuple(calibration(Path("../text.txt"), samples=4))
RECOVERY = tuple(calibration(Path("../text.txt"), samples=8))
COMMANDS = {
    "search": Command(
        ("search", "../model", "--remove", 2, *TEXT, "--sample-tokens", 4, "-o", "new.json"),
        "new.json",
        again=("--resume", "--force"),
        progress=("work/new.json.journal",),
        printed=True,
    ),
    "search streamed": Command(
        ("search", "../model", "--remove", 1, *TEXT, "--sample-tokens", 4, "-o", "plan.json", "--stream", "--force"),
        "plan.json",
        replaces=True,
        again=("--resume",),
        progress=("work/plan.json.journal",),
        printed=True,
    ),
    "search gguf": Command(
        ("search", "../tiny.gguf", "--remove", 1, *TEXT, "--sample-tokens", 4, "-o", "new.json"),
        "new.json",
        again=("--resume", "--force"),
        progress=("work/new.json.journal",),
        printed=True,
    ),
    "bench --estimate": Command(
        ("bench", "plan.json", "--estimate", "--device-flops", "1e12", "--device-bandwidth", "1e11",
         "--prompt-length", 8, "--new-tokens", 8, "-o", "speed.json"),
        "speed.json",
        printed=True,
    ),
    "apply": Command(("apply", "plan.json", "-o", "small", "--max-shard-size", "100kB"), "small"),
    "apply gguf": Command(("apply", "../tiny.gguf", "--blocks", "2,3", "-o", "small.gguf"), "small.gguf"),
    "apply --recover": Command(
        ("apply", "plan.json", "-o", "old", "--recover", *RECOVERY, "--force"),
        "old",
        replaces=True,
        again=(),
        progress=("work/.old.recovery/*",),
    ),
    "apply --heal": Command(
        ("apply", "plan.json", "-o", "old", "--heal", "--heal-tokens", 512, *RECOVERY, "--force"),
        "old",
        replaces=True,
        again=("--resume",),
        progress=("work/.old.recovery/*",),
    ),
    "eval": Command(
        ("eval", "plan.json", "--perplexity", "../text.txt", "--sequence-length", 32, "--max-windows", 4,
         "-o", "scores.json"),
        "scores.json",
        spare=("cache/evaluations/*", "work/plan.eval.json"),
        printed=True,
    ),
    "export": Command(("export", "plan.json", "--to", "mergekit", "-o", "merge.yaml", "--force"), "merge.yaml",
                      replaces=True, again=()),
    "report": Command(("export", "plan.json", "--to", "report", "-o", "report.html"), "report.html"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call that fails: the line of the trace, the error, and the fault that makes it fail."""

    call: str
    error: str
    fault: Fault

    @property
    def path(self) -> str:
        """The path of the call, below the disk."""
        return os.path.normpath(self.call.split(" ", 2)[2])


def cases(disk: Path, trace: tuple[str, ...]) -> list[Case]:
    """Let each call of a trace fail once, with each error in turn that its sort can meet."""
    found = []
    turns = {sort: in_turns(errors) for sort, errors in ERRORS.items()}
    sorts = [sort_of(line) for line in trace]
    for place, (line, sort) in enumerate(zip(trace, sorts, strict=True)):
        error = next(turns[sort])
        what, calls = LASTING.get(error, (SHORT if error == "SHORT" else getattr(errno, error, 0), sort))
        at = sum(bool(other & calls) for other in sorts[: place + 1])
        found.append(Case(line, error, Fault(disk, at, what, calls, lasting=error in LASTING)))
    return found


def in_turns(errors: tuple[str, ...]) -> Iterator[str]:
    """Yield all errors, and then all of them again, each time in another order."""
    rng = random.Random(0)
    while True:
        yield from rng.sample(errors, len(errors))


def sort_of(line: str) -> Calls:
    """Return the sort of a traced call; one that copies in the kernel counts once for each of its two files."""
    _, name, path = line.split(" ", 2)
    if name == "copy_file_range":
        return Calls.WRITE if path.startswith(("/work", "/cache")) else Calls.READ
    return SORTS[name]


class Disk:
    """A folder with a model, a text and what commands make of them, in which every call can fail."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.work = folder / "work"
        self.start: dict[str, bytes] = {}
        self._undisturbed: dict[str, tuple[tuple[str, ...], dict[str, bytes]]] = {}
        self.environment = {"SLEB_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}

    def reset(self) -> None:
        """Begin again."""
        for name in ("work", "cache", "tmp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        shutil.copytree(self.folder / "begin", self.work, dirs_exist_ok=True)

    def run(self, command: Command, *more: object, fault: Fault | None = None, **options: object) -> Finished:
        """Run a command where it is."""
        words = (*command.words, *more)
        return self.program.run(*words, cwd=self.work, fault=fault, environment=self.environment, **options)

    def undisturbed(self, name: str) -> tuple[tuple[str, ...], dict[str, bytes]]:
        """Return the calls of an undisturbed run of a command, and the files that it leaves."""
        if name not in self._undisturbed:
            self.reset()
            run = self.run(COMMANDS[name], fault=Fault(self.folder))
            assert run.exit_code == 0, run.stderr
            self._undisturbed[name] = run.calls, self.files()
        return self._undisturbed[name]

    def files(self) -> dict[str, bytes]:
        """Return what lies on the disk beside what was given, without the time that it took."""
        return {
            str(path.relative_to(self.folder)): without_times(path.read_bytes())
            for name in ("work", "cache", "tmp")
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file()
        }


TIMES = re.compile(rb'"(started|seconds|prepared_in|[a-z_]*seconds[a-z_]*)": ?("[^"]*"|[-0-9.e]+)')


def without_times(content: bytes) -> bytes:
    return TIMES.sub(b"", content)


@pytest.fixture(scope="module")
def disk(program, tiny_llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "text.txt").write_text("".join(text_file.read_text().splitlines(keepends=True)[:40]))
    write_llama_gguf(folder / "tiny.gguf")
    shutil.rmtree(folder / "origin")
    (folder / "begin").mkdir()
    disk = Disk(program, folder)
    disk.reset()
    plan = Command(("search", "../model", "--remove", 2, *TEXT, "-o", "plan.json", "--sample-tokens", 4), "plan.json")
    for command in (plan, Command(("apply", "plan.json", "--remove", 1, "-o", "old"), "old")):
        done = disk.run(command)
        assert done.exit_code == 0, done.stderr
    (disk.work / "merge.yaml").write_text("older\n")
    shutil.rmtree(folder / "begin")
    shutil.copytree(disk.work, folder / "begin")
    disk.reset()
    disk.start = disk.files()
    return disk


@counts(2, 100_000)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_that_fails_costs_a_sentence_at_most(disk, name, count, tried):
    command = COMMANDS[name]
    trace, whole = disk.undisturbed(name)
    every = cases(disk.folder, trace)
    step = max(1, len(every) // count)
    chosen = every[random.Random(name).randrange(step) :: step]
    ends: Counter[str] = Counter()
    problems = []
    for case in chosen:
        disk.reset()
        finished = disk.run(command, fault=case.fault)
        ends[f"exit {finished.exit_code}"] += 1
        left = disk.files()
        found = [*problems_of(command, case, finished, disk.start, whole, left)]
        if left != disk.start and left != whole:
            ends["run again"] += 1
            again = disk.run(command, *command.again)
            if again.exit_code != 0:
                found.append(f"again: {again.exit_code} {again.stderr[-300:]}")
            elif missing := differing(whole, disk.files()):
                found.append(f"again, other files: {missing}")
        problems += [f"{case.error} at {case.call}: {problem}" for problem in found]
    met = Counter(f"{case.error} at {sort_of(case.call).name}" for case in chosen)
    print(f"\n{name}: {len(chosen)} of {len(every)} calls failed: {dict(ends)}; {dict(met)}")
    assert not problems, "\n".join([f"{len(problems)} problems:", *problems])
    tried("calls to the file system that fail", len(chosen))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_given_its_name_is_on_the_disk(disk, name):
    """Whatever was written is flushed before the file or folder that it is in is renamed, and the new name after it."""
    trace, _ = disk.undisturbed(name)
    calls = [(sort_of(line), Path(line.split(" ", 2)[2])) for line in trace]
    named = [(place, path) for place, (sort, path) in enumerate(calls) if sort is Calls.RENAME and is_final(path)]
    assert any(path.name == COMMANDS[name].output for _, path in named)
    for place, path in named:
        written = {
            file: at
            for at, (sort, file) in enumerate(calls[:place])
            if sort is Calls.WRITE
            and re.match(rf"\.{re.escape(path.name)}\..*", own_part(file, path))
            and is_kept(file)
        }
        assert written, path
        for file, last in written.items():
            assert (Calls.SYNC, file) in calls[last:place], f"{file} is not flushed before {path} has its name"
        assert (Calls.SYNC, path.parent) in calls[place:], f"the name {path} is not flushed"


def own_part(file: Path, named: Path) -> str:
    """Return the part of a file's path that lies in the same folder as what is named; "" if it lies elsewhere."""
    return file.relative_to(named.parent).parts[0] if file.is_relative_to(named.parent) else ""


def is_final(path: Path) -> bool:
    """Whether nothing of a path is hidden."""
    return not any(part.startswith(".") for part in path.parts)


def is_kept(file: Path) -> bool:
    """Whether a file that is written aside is part of what gets a name: not what a proof writes and deletes."""
    return not any(part.startswith((".again", ".tmp")) or part == "checkpoint" for part in file.parts)


def differing(whole: dict[str, bytes], left: dict[str, bytes]) -> list[str]:
    """Return the names of files that differ from those of an undisturbed run; hidden leftovers do not count."""
    return [
        name
        for name in sorted(whole.keys() | left.keys())
        if left.get(name) != whole.get(name) and not is_leftover(name)
    ]


def is_leftover(name: str) -> bool:
    """Whether a file lies where an unfinished output is written, or with temporary files."""
    unfinished = r"\..*\.(partial|replaced)|\..*\.(?!recovery)\w{8}|\.again-\w+"
    return name.startswith("tmp/") or any(re.fullmatch(unfinished, part) for part in Path(name).parts)


def problems_of(command, case, finished, start, whole, left):
    """Yield what is wrong with how a disturbed run ended, and with what it left."""
    expected = "exit 0" if finished.exit_code == 0 else "an error"
    undeletable = case.error == DEAD or sort_of(case.call) is Calls.REMOVE
    for name in sorted(start.keys() | whole.keys() | left.keys()):
        if is_leftover(name):
            if not undeletable:
                yield f"{expected}, and {name} is left"
        elif undeletable and name not in whole and any(fnmatch(name, pattern) for pattern in command.progress):
            continue
        elif not may_be(command, name, finished.exit_code, left.get(name), start.get(name), whole.get(name)):
            yield f"{expected}, and {name} is {'another' if name in left else 'missing'}"
    if finished.exit_code == 0:
        return
    if case.error == "SHORT":
        yield f"a call that did half of its work ended the run with {finished.exit_code}"
    yield from problems_of_error(command, case, finished)
    about_to_be_saved = f".{command.output}." in case.path and ".partial" in case.path
    is_done = "Loading" in finished.stderr  # the place is claimed once before all work, too
    if command.printed and about_to_be_saved and is_done and finished.exit_code == OUTPUT:
        try:
            json.loads(finished.stdout)
        except ValueError:
            yield f"the result was not printed: {finished.stdout[:100]!r}"


def may_be(command, name, exit_code, found, before, whole):
    """Whether a file may have this content after a run: what it should have, or if the run failed, what it had."""
    if found == whole:
        return True
    if exit_code == 0:
        return found is None and any(fnmatch(name, pattern) for pattern in command.spare)
    return found == before or any(fnmatch(name, pattern) for pattern in command.progress)


def problems_of_error(command, case, finished):
    """Yield what is wrong with the sentence and the exit code of a run that failed."""
    said = finished.stderr
    if finished.exit_code not in exit_codes(case):
        yield f"exit code {finished.exit_code}: {said[-700:]}"
        return
    errors = re.findall(r"^error: .*", said, re.MULTILINE)
    if "Traceback" in said or len(errors) != 1 or not re.search(r"^hint: \S", said, re.MULTILINE):
        yield f"no single sentence with its hint: {said[-700:]}"
    elif case.error not in LASTING and not any(name in errors[0] for name in names_of(command, case)):
        yield f"{names_of(command, case)} are not named: {errors[0]}"


def exit_codes(case) -> set[int]:
    """Return the exit codes that fit a failure."""
    if case.error == DEAD:  # whatever is asked of the disk next
        return {PLAN, MODEL, DATA, OUTPUT}
    if sort_of(case.call) not in Calls.READS:
        return {OUTPUT}
    if case.path.startswith("/work/plan.json.journal") or case.path == "/work/plan.json" or ".recovery" in case.path:
        return {PLAN}
    codes = {"/text.txt": {DATA}, "/model": {MODEL}, "/tiny.gguf": {MODEL}, "/cache": {MODEL, OUTPUT}}
    return next((codes[start] for start in codes if case.path.startswith(start)), {OUTPUT})


def names_of(command, case) -> set[str]:
    """Return the names of which one must be in the sentence: of the file or its folder, as the user knows them."""
    parts = {re.sub(r"^\.(.*?)(\.\w{8})?(\.partial|\.replaced)?$", r"\1", part) for part in Path(case.path).parts}
    converted = {"tiny.gguf"} if case.path.startswith("/cache") else set()
    return parts - {"/", "work", "cache"} | converted or {"cache", "work", command.output}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, where the user may mount one."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@counts(1, 20)
@pytest.mark.parametrize(
    "name", ["apply", *(pytest.param(name, marks=pytest.mark.faults) for name in ("apply gguf", "search"))]
)
def test_a_disk_that_others_fill_meanwhile(disk, small_disk, name, count, tried):
    command = COMMANDS[name]
    environment = disk.environment | {"SLEB_CACHE": str(small_disk / "cache")}
    work = small_disk / "work"
    words = [Path(disk.folder, word[3:]) if str(word).startswith("../") else word for word in map(str, command.words)]
    shutil.copytree(disk.folder / "begin", work)

    def files():
        found = (path for path in small_disk.rglob("*") if path.is_file())
        return {str(path.relative_to(small_disk)): without_times(path.read_bytes()) for path in found}

    start = files()
    done = disk.program.run(*words, cwd=work, environment=environment, fault=Fault(small_disk, calls=Calls.CHANGES))
    assert done.exit_code == 0, done.stderr
    whole = files()
    writes = [at for at, line in enumerate(done.calls, start=1) if sort_of(line) in Calls.WRITE | Calls.MAKE]
    ends = Counter()
    for at in random.Random(name).sample(writes, min(count, len(writes))):
        for folder in (work, small_disk / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(disk.folder / "begin", work)
        fault = Fault(small_disk, at, STOP, Calls.CHANGES)
        running = disk.program.start(*words, cwd=work, environment=environment, fault=fault)
        assert running.wait_until_stopped()
        with contextlib.suppress(OSError), (small_disk / "of others").open("wb", buffering=0) as others:
            while others.write(bytes(4096)):
                pass
        running.send(signal.SIGCONT)
        finished = running.wait()
        ends[finished.exit_code] += 1
        (small_disk / "of others").unlink()
        if finished.exit_code == 0:
            assert files() == whole, done.calls[at - 1]
            continue
        said = f"{done.calls[at - 1]}: {finished.stderr}"
        assert finished.exit_code == OUTPUT, said
        assert len(re.findall("^error: .* is full", finished.stderr, re.MULTILINE)) == 1, said
        assert "Traceback" not in finished.stderr, said
        left = files()
        assert all(left.get(path) == content for path, content in start.items()), said
        assert not [path for path in left.keys() - start.keys() if not path.endswith(".journal")], said
        again = disk.program.run(*words, *command.again, cwd=work, environment=environment)
        assert again.exit_code == 0, again.stderr
        assert files() == whole
    print(f"\n{name}: {dict(ends)}")
    tried("disks that others fill", min(count, len(writes)))
