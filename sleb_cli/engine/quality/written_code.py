"""Run the programs that a model writes in tasks such as HumanEval.

The evaluate library's `code_eval` is fetched from the Hub, and runs them in copies of the process
that holds the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from sleb_cli.engine.process_limits import usable_processors
from sleb_cli.engine.quality.sandbox import confining_command
from sleb_cli.requests import RunCode
from sleb_plugins import MachineError

SECONDS = 60.0
"""The time that a program may wait for a processor; `program_runner` limits what it may use."""

PROGRAM_RUNNER = Path(__file__).with_name("program_runner.py")

METRIC = "code_eval"
"""The evaluate library's metric that runs programs for lm-eval's tasks."""


class CodeEval:
    """The object that `evaluate.load("code_eval")` returns, as far as tasks use it."""

    how: ClassVar[RunCode | None] = None

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Iterable[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Run each item's programs, each followed by the item's tests.

        Raises a MachineError if that is impossible.

        Returns:
            The mean pass@k over the items for each k that all have samples for (Chen et al., arXiv
            2107.03374, section
            2.1), and which programs of each item passed.
        """
        if self.how is None:
            return {}, {}  # a task that is being loaded tries the metric
        programs: list[str] = []
        items: list[int] = []
        for item, written in enumerate(predictions):
            for program in written:
                programs.append(f"{program}\n{references[item]}")
                items.append(item)
        with ThreadPoolExecutor(usable_processors()) as pool:
            outcomes = list(pool.map(partial(passes, how=self.how), programs))
        runs: dict[int, list[bool]] = {item: [] for item in range(len(predictions))}
        for item, program, passed in zip(items, programs, outcomes, strict=True):
            runs[item].append(_passes_alone(program, self.how) if passed is None else passed)
        fewest = min(map(len, runs.values()))
        means = {}
        for size in k:
            if size <= fewest:
                total = sum(_pass_at(size, results) for results in runs.values())
                means[f"pass@{size}"] = total / len(runs)
        return means, runs


def _pass_at(size: int, runs: Sequence[bool]) -> float:
    # The chance that one of `size` of these runs, drawn without replacement, passed.
    return 1 - comb(len(runs) - sum(runs), size) / comb(len(runs), size)


def passes(program: str, how: RunCode) -> bool | None:
    """Run a program; return whether it ends without an error, or None if its time ran out.

    Raises:
        MachineError: this system cannot run it so.
    """
    if sys.platform == "win32":
        raise MachineError(
            "Windows cannot limit what a program uses, so none is run.",
            hint="Use WSL, or leave the task out.",
        )
    from sleb_cli.engine.quality.program_runner import FAILED, PASSED

    with (
        tempfile.TemporaryDirectory(prefix="sleb-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            _command(how),
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what it starts ends with it
        ) as process,
    ):
        try:
            _, stderr = process.communicate(program.encode(errors="replace"), SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
    if process.returncode not in (PASSED, FAILED):
        lines = stderr.decode(errors="replace").splitlines()
        why = lines[-1] if lines else f"exit code {process.returncode}"
        raise MachineError(
            f"A program that the model wrote cannot be run {how} on this system: {why}.",
            hint="Use --run-code unconfined in a container or virtual machine of its own, or leave "
            "the task out.",
        )
    return process.returncode == PASSED


def _command(how: RunCode) -> list[str]:
    python = [sys.executable, "-I", "-c", PROGRAM_RUNNER.read_text(), how]
    command = [*confining_command(), *python] if how == "confined" else python
    if sys.platform != "linux":
        return command
    # If memory runs out, Linux ends the program rather than the model.
    return ["/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj && exec "$@"', "sh", *command]


def _passes_alone(program: str, how: RunCode) -> bool:
    passed = passes(program, how)
    if passed is None:
        raise MachineError(
            "This machine is too busy to tell whether a program that the model wrote is right: in "
            f"{SECONDS:.0f} seconds, alone, it neither ended nor used up its time.",
            hint="Measure again when less runs here.",
        )
    return passed


def is_run_by(function: Any) -> bool:
    """Whether a metric of a task runs programs by `CodeEval`."""
    values = getattr(function, "__globals__", {}).values()
    return any(isinstance(value, CodeEval) for value in values)


def replace_code_eval() -> AbstractContextManager[Any]:
    """Let tasks that are loaded within this context run programs by `CodeEval`."""
    import evaluate

    load = evaluate.load

    def chosen(path: str, *rest: Any, **options: Any) -> Any:
        return CodeEval() if path == METRIC else load(path, *rest, **options)

    return mock.patch.object(evaluate, "load", chosen)
