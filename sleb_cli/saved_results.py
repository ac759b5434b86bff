"""Kept results of `eval` and `bench`: a file per text, task or workload, named by its key."""

from pathlib import Path
from typing import TypeVar

from sleb_cli.atomic import writing
from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.keys import Key, name_of
from sleb_cli.plan import CHECKPOINT_PLAN
from sleb_cli.records import UnreadableRecord
from sleb_cli.requests import sibling
from sleb_cli.results import BenchResult, EvalResult
from sleb_plugins import OutputError

R = TypeVar("R", EvalResult, BenchResult)

CHECKPOINT_RESULTS = "sleb_results"
"""The folder in a checkpoint for results of that checkpoint alone."""


def results_folder(plan: Path) -> Path:
    """Return the folder of a plan's results: plan.results."""
    return sibling(plan, ".results")


def keep_result(result: R, item_key: Key, folder: Path, notify: Notify) -> None:
    """Write the result of one text, task or workload to a file of its own.

    `item_key` holds what it depends on besides `result.key` and its sizes. If nothing can be
    written, the listener is told.
    """
    if folder.name in (CHECKPOINT_RESULTS, results_folder(Path(CHECKPOINT_PLAN)).name):
        result = result.published()  # the folder is in a checkpoint, which may be published
    sizes = sorted(sorted(size) for size in result.size_keys)
    name = f"{_name(result, item_key)}-{name_of({'sizes': sizes})[:8]}.json"
    try:
        with writing(folder):
            folder.mkdir(exist_ok=True)
        result.write(folder / name)
    except OutputError as error:
        notify(Notice(f"The result is not kept for reports: {error.message}"))


def find_kept(like: R, item_key: Key, folder: Path, notify: Notify) -> list[R]:
    """Return the results of this item in the setting of `like`, the oldest first."""
    results = read_results(type(like), folder, notify, f"{_name(like, item_key)}-")
    return list(results.values())


def read_results(
    kind: type[R], folder: Path, notify: Notify, prefix: str | None = None
) -> dict[Path, R]:
    """Read the results of a kind by file, the oldest first; what cannot be read is a warning."""
    if prefix is None:
        prefix = "eval-" if kind is EvalResult else "bench-"
    files = sorted(folder.glob(f"{prefix}*.json"), key=lambda file: file.lstat().st_mtime_ns)
    results = {}
    for file in files:
        try:
            results[file] = kind.read(file, "the result")
        except FileNotFoundError:  # a link that leads nowhere
            continue
        except UnreadableRecord as error:
            notify(Warned(f"Ignoring {file}: this version of sleb cannot read it ({error})."))
    return results


def delete_results(folder: Path) -> None:
    """Delete the results in a folder, and the folder if nothing else is in it."""
    for file in folder.glob("eval-*.json"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _name(result: EvalResult | BenchResult, item_key: Key) -> str:
    return f"{result.kind}-{name_of({**result.key, **item_key})[:16]}"
