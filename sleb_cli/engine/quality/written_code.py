"""Run the programs that a model writes in tasks such as HumanEval, in place of `code_eval` of the evaluate library.

That one is fetched from the Hub, and runs them in copies of the process that holds the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any
from unittest import mock

from sleb_plugins import MachineError

SECONDS = 10.0
"""How long a program may take by the clock; see `confined` for what else it may use."""

CONFINED = Path(__file__).with_name("confined.py")
PASSED = 86

METRIC = "code_eval"
"""The metric of evaluate by which lm-eval's tasks run programs."""


class CodeEval:
    """What `evaluate.load("code_eval")` returns, as far as tasks use it."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Iterable[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Run each item's programs, each followed by the item's tests.

        Returns:
            The mean pass@k over the items for each k that all have samples for (Chen et al., arXiv 2107.03374, section
            2.1), and which programs of each item passed.

        Raises:
            MachineError: this system cannot limit what a program uses.
        """
        if sys.platform == "win32":
            raise MachineError(
                "Windows cannot limit what a program uses, so none is run.", hint="Use WSL, or leave the task out."
            )
        items = list(zip(references, predictions, strict=True))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = pool.map(passes, [f"{program}\n{tests}" for tests, written in items for program in written])
            found = {item: list(islice(passed, len(written))) for item, (_, written) in enumerate(items)}
        fewest = min(map(len, found.values()))
        means = {
            f"pass@{size}": sum(_pass_at(size, runs) for runs in found.values()) / len(found)
            for size in k
            if size <= fewest
        }
        return means, found


def _pass_at(size: int, runs: Sequence[bool]) -> float:
    """Return the chance that one of `size` of these runs, drawn without replacement, passed."""
    return 1 - comb(len(runs) - sum(runs), size) / comb(len(runs), size)


def passes(program: str) -> bool:
    """Whether a program comes to its end, by itself and without an error."""
    with tempfile.TemporaryDirectory(prefix="sleb-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8", errors="replace")
        # In a session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            _command(str(file), str(PASSED)),
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(SECONDS) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
            process.wait()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-I", str(CONFINED), *arguments]


def unconfined() -> str:
    """Name what this system does not keep programs from, such as the network; empty if it keeps them from all."""
    with tempfile.TemporaryDirectory(prefix="sleb-") as folder:
        found = subprocess.run(_command("--check"), cwd=folder, capture_output=True, text=True, check=True)
        return found.stdout.strip()


def is_run_by(function: Any) -> bool:
    """Whether a metric of a task runs programs by `CodeEval`."""
    return any(isinstance(value, CodeEval) for value in getattr(function, "__globals__", {}).values())


@contextmanager
def ours() -> Iterator[None]:
    """Have tasks that are loaded meanwhile run programs by `CodeEval`."""
    import evaluate

    load = evaluate.load

    def chosen(path: str, *rest: Any, **options: Any) -> Any:
        return CodeEval() if path == METRIC else load(path, *rest, **options)

    with mock.patch.object(evaluate, "load", chosen):
        yield
