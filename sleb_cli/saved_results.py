"""Where are results of `eval` and `bench` saved? Next to the plan, or in the checkpoint, for
reports.
"""

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
    """Return the file of a plan's results: plan.eval.json or plan.bench.json."""
    return sibling(plan, f".{kind}.json")


def save_result(result: R, file: Path, notify: Notify) -> R:
    """Merge a result with the saved ones of its key, write them to `file`, and return them.

    Results of another key that `file` holds move to a file of their own beside it. If nothing can
    be written, the listener is told, and the result is still returned.
    """
    if file.name.startswith(("sleb_eval.", "sleb_bench.", f"{Path(CHECKPOINT_PLAN).stem}.")):
        result = result.published()  # the folder is a checkpoint, which may be published
    merged = result
    try:
        with claimed(file, replace=True) as aside:  # so that no result of another process is lost
            current = read_saved(type(result), file, notify)
            before = find_saved(result, file, ignore)
            merged = result if before is None else result.merged_with(before)
            aside.write_text(to_json(merged.to_data()), encoding="utf-8")
            if file.is_file() and (current is None or current.key != result.key):
                moved = _free_name(file) if current is None else _beside(file, current)
                file.replace(moved)
                notify(
                    Notice(
                        f"{file} held results for a different model or setting, which are now in "
                        f"{moved.name}."
                    )
                )
            if isinstance(result, BenchResult) and isinstance(merged, BenchResult):
                _warn_if_shorter_run(result, merged, file, notify)
        with writing(file):
            _beside(file, result).unlink(missing_ok=True)  # `file` has its results now
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))
    return merged


def find_saved(like: R, file: Path, notify: Notify) -> R | None:
    """Return the saved result with the key of `like`, from `file` or from the file beside it for
    this key.
    """
    for candidate in (file, _beside(file, like)):
        saved = read_saved(type(like), candidate, notify)
        if saved is not None and saved.key == like.key:
            return saved
    return None


def _beside(file: Path, result: EvalResult | BenchResult) -> Path:
    """Name the file of this key while `file` holds another: plan.eval.0123456789ab.json."""
    return sibling(file, f".{name_of(result.key)[:12]}.json")


def _free_name(file: Path) -> Path:
    """Name a new file for one that cannot be read: plan.eval.json.old, plan.eval.2.json.old, …."""
    paths = (
        sibling(file, f"{'' if number == 1 else f'.{number}'}.json.old") for number in count(1)
    )
    return next(path for path in paths if not path.exists())


def _warn_if_shorter_run(
    result: BenchResult, merged: BenchResult, file: Path, notify: Notify
) -> None:
    saved = {timed.workload.identity: timed.workload for timed in merged.workloads}
    for new in (timed.workload for timed in result.workloads):
        runs, more = new.iterations, saved[new.identity].iterations
        if more > runs:
            notify(
                Notice(
                    f"{file} keeps the earlier {more} runs of {new.label}, which are more reliable "
                    f"than {runs}. "
                    f"To replace them, use --iterations {more} or more."
                )
            )


def read_saved(kind: type[R], file: Path, notify: Notify) -> R | None:
    """Read a saved result; None if there is none, with a warning if the file cannot be read."""
    try:
        return kind.read(file, "the result")
    except FileNotFoundError:
        return None
    except UnreadableRecord as error:
        notify(Warned(f"Ignoring {file}: this version of sleb cannot read it ({error})."))
        return None
