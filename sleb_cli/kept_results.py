"""Results that stay beside what was measured, so that a report finds what several runs of `eval` and `bench` said."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from sleb_cli.events import Notice, Notify
from sleb_cli.results import BenchResult, EvalResult
from sleb_plugins import OutputError

R = TypeVar("R", EvalResult, BenchResult)

IN_CHECKPOINT: dict[Literal["eval", "bench"], str] = {"eval": "sleb_eval.json", "bench": "sleb_bench.json"}
"""The files in a checkpoint that hold what was measured of it."""


def beside_plan(plan: Path, kind: Literal["eval", "bench"]) -> Path:
    """Return where the results for a plan are kept: plan.eval.json, plan.bench.json."""
    return plan.with_suffix(f".{kind}.json")


def keep_result(result: R, file: Path, notify: Notify) -> R:
    """Write a result to its place, together with what was measured before on the same model; return both.

    A file that cannot be read or written is no reason to lose the result: the listener is told.
    """
    previous = read_kept(type(result), file, notify)
    merged = result if previous is None else result.merged_with(previous)
    if previous is not None and merged is result:
        notify(Notice(f"{file} held results of another model or in another setting, and is replaced."))
    result = merged
    try:
        result.write(file)
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))
    return result


def read_kept(kind: type[R], file: Path, notify: Notify) -> R | None:
    """Return the result kept in a file; None, with a notice if there is a file that cannot be read as one."""
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError):
        notify(Notice(f"{file} holds no result of this version of sleb, and is left out."))
        return None
