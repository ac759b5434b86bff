"""Results of `eval` and `bench`, collected next to the plan or in the checkpoint, where reports find them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from sleb_cli.atomic import new_file, to_json
from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.plan import CHECKPOINT_PLAN
from sleb_cli.records import UnreadableRecord
from sleb_cli.requests import sibling
from sleb_cli.results import BenchResult, EvalResult
from sleb_plugins import OutputError

R = TypeVar("R", EvalResult, BenchResult)


def beside_plan(plan: Path, kind: Literal["eval", "bench"]) -> Path:
    """Return the file for results of a plan: plan.eval.json or plan.bench.json."""
    return sibling(plan, f".{kind}.json")


def keep_result(result: R, file: Path, notify: Notify) -> R:
    """Add a result to those in `file`, and return all of them together.

    Results that cannot be merged are moved aside: those of another model, setting or version of sleb, and those that
    cannot be read. If the file cannot be written, the listener is told and the result is still returned.
    """
    if file.name.startswith(("sleb_eval.", "sleb_bench.", f"{Path(CHECKPOINT_PLAN).stem}.")):
        result = result.published()  # a checkpoint may be published
    merged = result
    try:
        with new_file(file) as aside:  # read only now, so that nothing another process adds is lost
            previous = read_kept(type(result), file, notify)
            merged = result if previous is None else result.merged_with(previous)
            aside.write_text(to_json(merged.to_data()), encoding="utf-8")
            if merged is result and file.is_file():
                if previous is not None:
                    notify(Notice(f"{file} holds results for a different model or setting."))
                moved = file.with_name(f"{file.name}.old")
                file.replace(moved)
                notify(Notice(f"Moved the old {file} to {moved.name}."))
            if isinstance(result, BenchResult) and isinstance(merged, BenchResult):
                _warn_if_shorter_run(result, merged, file, notify)
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))
    return merged


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


def read_kept(kind: type[R], file: Path, notify: Notify) -> R | None:
    """Return the result in a file; None if there is none, with a notice if the file cannot be read."""
    try:
        return kind.read(file, "the result")
    except FileNotFoundError:
        return None
    except UnreadableRecord as error:
        notify(Warned(f"Ignoring {file}: this version of sleb cannot read it ({error})."))
        return None
