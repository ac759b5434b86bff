"""Results of `eval` and `bench`, collected next to the plan or in the checkpoint, where reports find them."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Literal, TypeVar

from sleb_cli.atomic import claimed, to_json, writing
from sleb_cli.events import Notice, Notify, Warned, ignore
from sleb_cli.keys import name_of
from sleb_cli.plan import CHECKPOINT_PLAN
from sleb_cli.records import UnreadableRecord
from sleb_cli.requests import sibling
from sleb_cli.results import BenchResult, EvalResult
from sleb_plugins import OutputError

R = TypeVar("R", EvalResult, BenchResult)


def beside_plan(plan: Path, kind: Literal["eval", "bench"]) -> Path:
    """Return the file for results of a plan: plan.eval.json or plan.bench.json."""
    return sibling(plan, f".{kind}.json")


def save_result(result: R, file: Path, notify: Notify) -> R:
    """Add a result to those kept in its setting, and return all of them together: they are in `file` from now on.

    Results in another setting, which includes the model and the versions, move to a file of their own beside it, where
    `find_saved` finds them. If nothing can be written, the listener is told and the result is still returned.
    """
    if file.name.startswith(("sleb_eval.", "sleb_bench.", f"{Path(CHECKPOINT_PLAN).stem}.")):
        result = result.published()  # a checkpoint may be published
    merged = result
    try:
        with claimed(file, replace=True) as aside:  # nothing that another process adds is lost
            current = read_saved(type(result), file, notify)
            before = find_saved(result, file, ignore)
            merged = result if before is None else result.merged_with(before)
            aside.write_text(to_json(merged.to_data()), encoding="utf-8")
            if file.is_file() and (current is None or current.key != result.key):
                moved = _unused(file) if current is None else _beside(file, current)
                file.replace(moved)
                notify(Notice(f"{file} held results for a different model or setting, which are now in {moved.name}."))
            if isinstance(result, BenchResult) and isinstance(merged, BenchResult):
                _warn_if_shorter_run(result, merged, file, notify)
        with writing(file):
            _beside(file, result).unlink(missing_ok=True)  # its results are in the new file
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))
    return merged


def find_saved(like: R, file: Path, notify: Notify) -> R | None:
    """Return what is kept in the setting of this result: in `file`, or beside it if another setting came later."""
    for place in (file, _beside(file, like)):
        found = read_saved(type(like), place, notify)
        if found is not None and found.key == like.key:
            return found
    return None


def _beside(file: Path, result: EvalResult | BenchResult) -> Path:
    """Return where results of this key are while `file` holds others: plan.eval.0123456789ab.json."""
    return sibling(file, f".{name_of(result.key)[:12]}.json")


def _unused(file: Path) -> Path:
    """Return where a file that cannot be read goes: plan.eval.json.old, or else plan.eval.2.json.old and so on."""
    places = (sibling(file, f"{'' if number == 1 else f'.{number}'}.json.old") for number in count(1))
    return next(place for place in places if not place.exists())


def _warn_if_shorter_run(result: BenchResult, merged: BenchResult, file: Path, notify: Notify) -> None:
    kept = {one.workload.identity: one.workload for one in merged.workloads}
    for new in (one.workload for one in result.workloads):
        runs, more = new.iterations, kept[new.identity].iterations
        if more > runs:
            notify(
                Notice(
                    f"{file} keeps the earlier {more} runs of {new.label}, which are more reliable than {runs}. "
                    f"To replace them, use --iterations {more} or more."
                )
            )


def read_saved(kind: type[R], file: Path, notify: Notify) -> R | None:
    """Return the result in a file; None if there is none, with a notice if the file cannot be read."""
    try:
        return kind.read(file, "the result")
    except FileNotFoundError:
        return None
    except UnreadableRecord as error:
        notify(Warned(f"Ignoring {file}: this version of sleb cannot read it ({error})."))
        return None
