"""Results that stay beside what was measured, so that a report finds what several runs of `eval` and `bench` said."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from sleb_cli.atomic import new_file, to_json
from sleb_cli.events import Notice, Notify
from sleb_cli.records import UnreadableRecord, first_fault, read_text
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

    A file that cannot be read or written is no reason to lose the result: the listener is told. What another version of
    sleb wrote, or was measured on another model or in another setting, is moved aside; what cannot be read now is not
    overwritten, because it may be read later.
    """
    merged = result
    try:
        with new_file(file) as aside:  # read only now, so that nothing is lost of what another process adds
            try:
                previous = read_kept(type(result), file, notify)
            except OSError as error:
                raise OutputError(f"{file} cannot be read: {error.strerror}.", hint="Check the disk.") from error
            merged = result if previous is None else result.merged_with(previous)
            if merged is result and file.is_file():
                if previous is not None:
                    notify(Notice(f"{file} holds results of another model or in another setting."))
                _move_aside(file, notify)
            if isinstance(result, BenchResult) and isinstance(merged, BenchResult):
                _name_outdone(result, merged, file, notify)
            aside.write_text(to_json(merged.to_data()), encoding="utf-8")
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))
    return merged


def _name_outdone(result: BenchResult, merged: BenchResult, file: Path, notify: Notify) -> None:
    for new, kept in result.outdone_by(merged):
        runs, more = new.workload.iterations, kept.workload.iterations
        notify(
            Notice(
                f"{file} keeps the earlier {more} runs of {kept.workload.label}, which say more than {runs}; "
                f"--iterations {more} or more replaces them."
            )
        )


def _move_aside(file: Path, notify: Notify) -> None:
    aside = file.with_name(f"{file.name}.old")
    with suppress(OSError):  # then the new file cannot be written, either, which is said
        file.replace(aside)
        notify(Notice(f"{file} is now {aside.name}."))


def read_kept(kind: type[R], file: Path, notify: Notify) -> R | None:
    """Return the result kept in a file; None, with a notice if there is a file that cannot be read as one.

    Raises:
        OSError: the disk does not give the file.
    """
    try:
        return kind.model_validate_json(read_text(file))
    except FileNotFoundError:
        return None
    except UnreadableRecord as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        notify(Notice(f"{file} holds no result of this version of sleb, and is left out."))
        return None
    except ValidationError as error:
        why = first_fault(error, "the result")
        notify(Notice(f"{file} holds no result of this version of sleb ({why}), and is left out."))
        return None
