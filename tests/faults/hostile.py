"""Runs hostile model folders through the program, many in one fork, and says of each how that ended.

A case is a list of files that replace those of a valid model. It runs within limits of memory and time; one that ends
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
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.hostile_reading import MEMORY
from faults.program import Limits, Program

SECRET = b"canary-that-must-stay-where-it-is-"
"""What the files outside the model's folder hold, so that it is found wherever it goes."""

PROCESSOR_SECONDS, CLOCK_SECONDS = 10, 300
BATCH = 50

PLACE = "@PLACE@"
"""Stands in a case for the folder that holds `model`, `outside` and what the program writes."""


@dataclass(frozen=True)
class Link:
    """A symbolic link to `target`."""

    target: str


@dataclass(frozen=True)
class Fifo:
    """A named pipe that nobody writes to."""


@dataclass(frozen=True)
class Folder:
    """An empty folder."""


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `head` and takes no room on the disk."""

    head: bytes
    size: int


@dataclass(frozen=True)
class Case:
    """Files that replace those of `base`, None where one is missing, and what the program does with the folder."""

    base: str
    what: str
    files: dict[str, Any]
    command: str = "read"

    def __str__(self) -> str:
        shown = {name: repr(content)[:3000] for name, content in self.files.items()}
        return f"{self.command} of {self.base} with {self.what}: {shown}"


@dataclass(frozen=True)
class Outcome:
    """How a case ended: its exit code, or that of its process, and what is wrong with that, if anything."""

    case: Case
    code: int | None
    said: str
    wrong: tuple[str, ...] = field(default=())
    seconds: float = 0.0


COMMANDS = {
    "read": (),
    "weights": (),
    "estimate": (
        "bench", "model", "--estimate", "--new-tokens", "8", "--device-flops", "1e12", "--device-bandwidth", "1e11",
    ),
    "apply": ("apply", "model", "--blocks", "1", "-o", "out"),
    "search": (
        "search", "model", "--remove", "1", "--calibration", "text.txt", "--samples", "2", "--sequence-length", "8",
        "--sample-tokens", "2", "-o", "out.json",
    ),
    "eval": (
        "eval", "model", "--perplexity", "text.txt", "--sequence-length", "8", "--max-windows", "2", "-o", "out.json",
    ),
    "chat": (
        "search", "model", "--remove", "1", "--calibration", "chat.jsonl", "--chat", "all", "--samples", "1",
        "--sequence-length", "8", "--sample-tokens", "2", "-o", "out.json",
    ),
}  # fmt: skip


def run_cases(program: Program, bases: dict[str, Path], cases: Sequence[Case], place: Path) -> list[Outcome]:
    """Run all cases, and return how each ended. One that fails in a batch counts only if it also fails alone."""
    outcomes: list[Outcome] = []
    for start in range(0, len(cases), BATCH):
        print(f"{start} of {len(cases)}", flush=True)
        for outcome in _run_batch(program, bases, cases[start : start + BATCH], place):
            again = _run_batch(program, bases, [outcome.case], place) if outcome.wrong else [outcome]
            outcomes += again
            if again[0].wrong:
                print(failures(again), flush=True)
    return outcomes


def _run_batch(program: Program, bases: dict[str, Path], cases: Sequence[Case], place: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        folder = Path(tempfile.mkdtemp(dir=place))
        rest = cases[len(outcomes) :]
        (folder / "cases").write_bytes(pickle.dumps((bases, rest)))
        limits = Limits(memory=MEMORY, seconds=CLOCK_SECONDS * (len(rest) + 1))
        finished = program.call(_be_the_program, str(folder), cwd=folder, limits=limits)
        told = folder / "outcomes"
        lines = told.read_text().splitlines() if told.exists() else []
        done = [json.loads(line) for line in lines]
        for case, (code, said, wrong, seconds) in zip(rest, done, strict=False):
            outcomes.append(Outcome(case, code, said, tuple(wrong), seconds))
        if len(done) < len(rest):
            signals = {-signal.SIGALRM: "took too long by the clock", -signal.SIGPROF: "took too long"}
            how = signals.get(finished.exit_code or 0, f"ended the process with {finished.exit_code}")
            outcomes.append(Outcome(rest[len(done)], finished.exit_code, finished.stderr[-2000:], (how,)))
        shutil.rmtree(folder)
    return outcomes


def failures(outcomes: Sequence[Outcome]) -> str:
    """Return a line for each case that did not end as it should."""
    bad = [outcome for outcome in outcomes if outcome.wrong]
    lines = [f"{'; '.join(outcome.wrong)}\n    {outcome.case}\n    {outcome.said[-1500:]}" for outcome in bad[:20]]
    return f"{len(bad)} of {len(outcomes)} cases:\n" + "\n".join(lines)


# What follows runs in the fork.


def _be_the_program(folder: str) -> int:
    """Run the cases in `folder`, and write after each how it ended."""
    bases, cases = pickle.loads((Path(folder) / "cases").read_bytes())
    with (Path(folder) / "outcomes").open("a", buffering=1) as told:
        for number, case in enumerate(cases):
            place = Path(folder) / "deep" / str(number)
            place.mkdir(parents=True)
            _lay_out(place, bases[case.base], case)
            begun = time.process_time()
            with _time_limit():
                outcome = _run_case(place, case)
            told.write(json.dumps([*outcome, time.process_time() - begun]) + "\n")
            os.chdir(folder)
            shutil.rmtree(place)
    return 0


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """End the process if the body takes too long: no Python code needs to run for that."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _lay_out(place: Path, base: Path, case: Case) -> None:
    shutil.copytree(base.parent / "outside", place / "outside")
    shutil.copytree(base, place / "model")
    for name in ("text.txt", "chat.jsonl"):
        shutil.copy(base.parent / name, place / name)
    for name, content in case.files.items():
        path = place / "model" / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content, str(place))


def _write(path: Path, content: Any, place: str) -> None:
    match content:
        case None:
            pass
        case Link(target):
            path.symlink_to(target.replace(PLACE, place))
        case Fifo():
            os.mkfifo(path)
        case Folder():
            path.mkdir()
        case Sparse(head, size):
            path.write_bytes(head)
            os.truncate(path, size)
        case bytes():
            # A length in front of a header stays right only if the place is as long as what stands for it.
            path.write_bytes(content.replace(PLACE.encode(), place.encode()))


def _run_case(place: Path, case: Case) -> tuple[int, str, list[str]]:
    os.chdir(place)
    for name, value in {
        "SLEB_CACHE": "cache",
        "HF_HUB_CACHE": "hub",
        "HF_MODULES_CACHE": "code",
        "TMPDIR": "tmp",
    }.items():
        (place / value).mkdir()
        os.environ[name] = str(place / value)
    tempfile.tempdir = None
    before = _content(place / "model"), _content(place / "outside")
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    wrong: list[str] = []
    trace = ""
    with _Watch(place / "outside") as watch:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = _run_command(place, case.command)
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            code, wrong = 1, [f"a traceback of {type(error).__name__}"]
        if touched := watch.events():
            wrong.append(f"files outside were touched: {touched}")
    printed, said = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    wrong += _wrong_words(code, said)
    if (_content(place / "model"), _content(place / "outside")) != before:
        wrong.append("files of the model, or outside, were changed")
    allowed = {"model", "outside", "cache", "hub", "code", "tmp", "out", "out.json", "text.txt", "chat.jsonl"}
    # Journals and results lie beside the output.
    strange = [path.name for path in place.iterdir() if path.name not in allowed and not path.name.startswith("out")]
    strange += [path.name for path in place.parent.iterdir() if path.name != place.name]
    strange += [path.name for path in place.parents[1].iterdir() if path.name not in ("deep", "cases", "outcomes")]
    if strange:
        wrong.append(f"something was written elsewhere: {strange}")
    if code and (place / "out").exists():
        wrong.append("a checkpoint was left by a run that failed")
    for name in ("cache", "hub", "tmp", "out", "out.json"):
        wrong += [f"{name} holds what was outside" for data in _content(place / name).values() if data == "secret"]
    if SECRET.decode() in printed + said:
        wrong.append("what was outside is on the screen")
    return code, trace or said, wrong


def _run_command(place: Path, command: str) -> int:
    from sleb_cli.__main__ import main
    from sleb_cli.api import _names_memory
    from sleb_cli.ui.console import print_error
    from sleb_plugins import SlebError

    try:
        if COMMANDS[command]:
            return main(list(COMMANDS[command]))
        with _names_memory("Use a larger machine."):
            if command == "weights":
                _read_weights(place / "model", place / "out")
            else:
                _read_model(place / "model")
    except SlebError as error:
        print_error(error)
        return error.exit_code
    return 0


def _read_weights(folder: Path, out: Path) -> None:
    """Read all tensors of the weight files, and copy them, as far as a checkpoint is written from them."""
    from sleb_cli.engine.files.shards import new_tensor, plan_shards, write_weights
    from sleb_cli.engine.files.weights import TORCH_DTYPES, find_weights

    weights = find_weights(folder)
    stored = weights.stored
    known = {tensor.name for tensor in stored if tensor.dtype in TORCH_DTYPES}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors(known)}
    assert shapes == {tensor.name: tensor.shape for tensor in stored if tensor.name in known}
    out.mkdir()
    kept = [new_tensor(tensor.name, tensor, None) for tensor in stored[:-1]]
    write_weights(out, plan_shards(weights, kept, 1 << 40), 0, lambda event: None)


def _read_model(folder: Path) -> None:
    """Read everything but the weights' values, as each command does first."""
    from sleb_cli.engine.model.architecture import read_architecture
    from sleb_cli.engine.model.sizes import count_parameters, stored_bytes
    from sleb_cli.engine.model.source import locate_model
    from sleb_cli.engine.output.apply import _plan_checkpoint
    from sleb_cli.engine.surgery.loading import load_tokenizer, quiet_libraries
    from sleb_cli.engine.surgery.surgery import plan_surgery
    from sleb_cli.engine.text.windows import adds_bos, cut_windows
    from sleb_cli.plugin_manager import load_plugins

    quiet_libraries()
    source = locate_model(str(folder), lambda event: None)
    architecture = read_architecture(source, load_plugins(), lambda event: None)
    _ = architecture.record, architecture.kinds, architecture.longest_sequence
    surgery = plan_surgery(architecture, (1,))
    count_parameters(architecture), stored_bytes(architecture)
    _plan_checkpoint(surgery, None, None, 1 << 30)
    tokenizer = load_tokenizer(source)
    cut_windows(tokenizer, "the river and the mill", 4, bos=adds_bos(tokenizer))


def _wrong_words(code: int, said: str) -> list[str]:
    """Say what is wrong with what a user reads."""
    wrong = []
    if not 0 <= code <= 9:
        wrong.append(f"exit code {code}")
    if code and not re.search(r"^error: .+\nhint: .+\n\Z", said, re.MULTILINE):
        wrong.append("not one sentence and a hint")
    if len(said) > 5000:
        wrong.append(f"{len(said)} characters")
    if re.search(r"[^\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\U0010ffff]", said):
        wrong.append("control characters")
    return wrong


def _content(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a folder, "secret" for one that holds the canary; links are not followed."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file() and path.stat().st_size > 64 << 20:
            found[str(path)] = str(path.stat().st_size)
        elif path.is_file():
            data = path.read_bytes()
            found[str(path)] = "secret" if SECRET in data else hashlib.md5(data).hexdigest()
        else:
            found[str(path)] = str(path.exists() and path.stat().st_mode)
    return found


_EVENTS = {
    0x1: "read", 0x2: "written", 0x4: "changed", 0x20: "opened", 0x40: "moved away", 0x80: "moved here", 0x100: "made",
    0x200: "removed", 0x400: "removed", 0x800: "moved",
}  # fmt: skip
"""Bits of inotify."""


class _Watch:
    """Asks the kernel which files of a folder are opened, read or changed, by whatever name and library."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "_Watch":
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        watching = libc.inotify_add_watch(self._fd, os.fsencode(self._folder), sum(_EVENTS))
        assert watching >= 0, os.strerror(ctypes.get_errno())
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def events(self) -> list[str]:
        """Return what happened so far."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 65536):
                while data:
                    mask, length = (int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
                    name = data[16 : 16 + length].rstrip(b"\0").decode()
                    found += [f"{name} {word}" for bit, word in _EVENTS.items() if mask & bit]
                    data = data[16 + length :]
        return sorted(set(found))
