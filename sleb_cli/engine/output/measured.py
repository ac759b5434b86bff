"""What `sleb eval` and `sleb bench` measured of a plan, kept beside it, for exporters and model cards."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from sleb_cli.events import Notify, Warned
from sleb_cli.kept_results import beside_plan, read_kept
from sleb_cli.plan import Plan, public_name
from sleb_cli.records import without_folders
from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import BenchResult, EvalResult
from sleb_cli.units import plural

R = TypeVar("R", EvalResult, BenchResult)


def measured_of_plan(kind: type[R], path: Path, plan: Plan, notify: Notify) -> R | None:
    """Return what was measured of the sizes of a plan, without local folders; None if nothing was.

    What cannot be read or belongs to another model is left out, with a warning: a report with a gap is better than
    none.
    """
    file = beside_plan(path, "eval" if kind is EvalResult else "bench")
    result = read_kept(kind, file, notify)
    if result is None:
        return None
    if isinstance(result, BenchResult):  # `-o` may have put those of another engine there
        own = tuple(each for each in result.workloads if each.workload.engine == TRANSFORMERS)
        result = result.model_copy(update={"workloads": own})
    if result.model.fingerprint != plan.model.fingerprint:
        notify(Warned(f"Ignoring {file}: it was measured on a different model than {path}."))
        return None
    if isinstance(result, EvalResult) and plan.recovery and result.recovered is None:
        notify(Warned(f"Ignoring {file}: it was measured before the blocks of {path} were recovered."))
        return None
    planned = {frozenset(removals) for removals in plan.by_size}
    measured = {frozenset(entry.removals) for part in parts_of(result) for entry in part.pruned}
    # A plan that was cut to fewer removals no longer tells its larger sizes from another plan's.
    strangers = {removals for removals in measured - planned if len(removals) <= len(plan.removals)}
    if strangers:
        notify(Warned(f"Ignoring {plural(len(strangers), 'size')} in {file} that {path} does not have."))
    return without_local_folders(_only_sizes(result, planned)) if measured & planned else None


def parts_of(result: EvalResult | BenchResult) -> tuple[Any, ...]:
    """Return the texts and tasks, or the workloads, each of which has its sizes in `pruned`."""
    return (*result.texts, *result.tasks) if isinstance(result, EvalResult) else result.workloads


def _only_sizes(result: R, wanted: Collection[frozenset[int]]) -> R:
    """Return a result without other sizes."""

    def kept(entries: Iterable[Any]) -> tuple[Any, ...]:
        found = (entry for entry in entries if frozenset(entry.removals) in wanted)
        return tuple(sorted(found, key=lambda entry: len(entry.removals)))

    def only(parts: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(part.model_copy(update={"pruned": kept(part.pruned)}) for part in parts)

    if isinstance(result, BenchResult):
        return result.model_copy(update={"workloads": only(result.workloads), "pruned": kept(result.pruned)})
    sizes = tuple(sorted((size for size in result.sizes if frozenset(size) in wanted), key=len))
    return result.model_copy(update={"texts": only(result.texts), "tasks": only(result.tasks), "sizes": sizes})


def without_local_folders(result: R) -> R:
    """Return a result that may be published: files and local models are named without their folders."""
    model = result.model.model_copy(update={"id": without_folders(result.model.id)})
    if isinstance(result, BenchResult):
        return result.model_copy(update={"model": model})
    texts = tuple(text.model_copy(update={"text": public_name(text.text)}) for text in result.texts)
    return result.model_copy(update={"model": model, "texts": texts})
