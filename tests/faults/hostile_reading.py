"""Hostile files: cases drawn by hypothesis, read in processes of their own with limits of memory and time.

A process reads many cases, one after another, and writes how each ends before it begins the next: what kills it is the
case after the last one written.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.program import Calls, Fault, Finished, Limits, Program

MEMORY = 2 << 30
SECONDS = 10
"""Of a processor. Of the clock, it is more, since other tests run beside."""
SECONDS_OF_THE_CLOCK = 60
AT_ONCE = 100


@dataclass(frozen=True)
class Ended:
    """How a case ended: its number, whether it was taken for good, and the sentence or the traceback if it was not."""

    number: int
    how: str
    words: str


def draw(strategy: Any, count: int) -> list[Any]:
    """Return this many cases of a hypothesis strategy, always the same ones."""
    from hypothesis import HealthCheck, Phase, given, settings

    cases: list[Any] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(strategy)
    def collect(case: Any) -> None:
        cases.append(case)

    collect()
    return cases


def read_all(
    program: Program, reader: Callable[[Path, Path], object], cases: Sequence[bytes], folder: Path, suffix: str
) -> list[Ended]:
    """Have `reader` read each case, a file of its own, and return how they ended: only a `SlebError` is a good end.

    The reader also gets a folder to write to. Hostile names point to a canary beside it, which nothing touches.
    """
    files, own = folder / "cases", folder / "own"
    files.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        (files / f"{number}{suffix}").write_bytes(case)
    place = canary(folder)
    ended: list[Ended] = []
    name = f"{reader.__module__}:{reader.__qualname__}"
    while len(ended) < len(cases):
        first, last = len(ended), min(len(ended) + AT_ONCE, len(cases))
        own.mkdir(exist_ok=True)
        finished = program.call(
            _read_cases, name, suffix, str(first), str(last), cwd=own, fault=Fault(place),
            limits=Limits(memory=MEMORY, seconds=SECONDS_OF_THE_CLOCK + SECONDS * (last - first)),
            environment=environment(folder),
        )  # fmt: skip
        assert not finished.calls, f"{name} touched the canary in cases {first} to {last}: {finished.calls}"
        written = [json.loads(line) for line in finished.stderr.splitlines() if line.startswith('["ended"')]
        ended += [Ended(number, how, words) for _, number, how, words in written]
        if len(written) < last - first:
            how = "took too long" if finished.exit_code is None else f"ended the process ({finished.exit_code})"
            ended.append(Ended(len(ended), how, finished.stderr[-2000:]))
    require_whole(place)
    return ended


def canary(folder: Path) -> Path:
    """Make a folder with what hostile names point to."""
    place = folder / "canary"
    place.mkdir(exist_ok=True)
    (place / "secret.txt").write_text("secret " * 100)
    (place / "plan.json").write_text("{}")
    return place


def require_whole(place: Path) -> None:
    """Check that a canary is as it was made."""
    assert sorted(path.name for path in place.iterdir()) == ["plan.json", "secret.txt"]
    assert (place / "secret.txt").read_text() == "secret " * 100
    assert (place / "plan.json").read_text() == "{}"


def environment(folder: Path) -> dict[str, str]:
    """Return variables that keep a run in this folder, and off the network."""
    return {"SLEB_CACHE": str(folder / "cache"), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


def require_sentences(ended: Sequence[Ended], cases: Sequence[bytes]) -> dict[str, int]:
    """Check that each case was taken or refused with a sentence, and count them by how they ended."""
    wrong = [end for end in ended if end.how not in ("taken", "refused")]
    shown = "\n\n".join(f"case {end.number} {end.how}: {cases[end.number][:300]!r}\n{end.words}" for end in wrong[:5])
    assert not wrong, f"{len(wrong)} of {len(ended)} cases\n{shown}"
    counted: dict[str, int] = {}
    for end in ended:
        counted[end.how] = counted.get(end.how, 0) + 1
    return counted


def require_sentence(finished: Finished, *codes: int) -> None:
    """Check that a command ended with one of these exit codes, and unless that is 0, with one sentence and a hint."""
    said = f"{finished.arguments}: {finished.exit_code} after {finished.seconds:.1f} s\n{finished.stderr[-3000:]}"
    assert finished.exit_code in codes, said
    assert "Traceback" not in finished.stderr, said
    assert "\x1b" not in finished.stderr + finished.stdout, said
    if finished.exit_code:
        lines = finished.stderr.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, said
        assert sum(line.startswith("hint: ") for line in lines) == 1, said


def run_on(
    program: Program, folder: Path, *arguments: object, codes: Sequence[int], processor_seconds: int = SECONDS
) -> Finished:
    """Run a command within the limits, and check how it ends and that nothing touches the canary."""
    place = canary(folder)
    finished = program.run(
        *arguments,
        cwd=folder,
        fault=Fault(place, calls=Calls.ALL),
        limits=Limits(memory=MEMORY, seconds=SECONDS_OF_THE_CLOCK, processor_seconds=processor_seconds),
        environment=environment(folder),
    )
    require_sentence(finished, *codes)
    assert not finished.calls, f"{finished.arguments} touched what it was not told to: {finished.calls}"
    require_whole(place)
    return finished


class _TooLong(BaseException):
    pass


def _read_cases(name: str, suffix: str, first: str, last: str) -> None:
    """Read cases in the process of a run: see `read_all`."""
    from sleb_plugins import SlebError

    module, _, function = name.partition(":")
    reader = getattr(importlib.import_module(module), function)

    def late(number: int, frame: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    for number in range(int(first), int(last)):
        how, words = "taken", ""
        signal.alarm(SECONDS_OF_THE_CLOCK)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader(Path("..", "cases", f"{number}{suffix}").resolve(), Path.cwd())
        except SlebError as error:
            how, words = "refused", error.message
            if not (error.message.strip() and error.hint.strip()) or len(error.message) > 5000:
                how = "was refused without a sentence or a hint"
        except _TooLong:
            how, words = "took too long", traceback.format_exc()
        except Exception:
            how, words = "raised", traceback.format_exc()
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(sys.stderr.fileno(), (json.dumps(["ended", number, how, words[-1500:]]) + "\n").encode())
