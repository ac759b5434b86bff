"""Which results beside a plan describe it? Read for exporters and model cards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from sleb_cli.events import Notify, Warned
from sleb_cli.plan import Plan
from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import (
    BenchResult,
    EvalResult,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
    of_sizes,
)
from sleb_cli.saved_results import R, beside_plan, read_saved
from sleb_cli.units import plural

_LISTS = ("texts", "tasks", "workloads")

S = TypeVar("S", PrunedTextScores, PrunedTaskScores, PrunedTiming, ModelSize)


def read_measurements(
    path: Path, plan: Plan, notify: Notify
) -> tuple[EvalResult | None, BenchResult | None]:
    """Read the results for the sizes of a plan, without local folders; None for one that is missing
    or does not fit.
    """
    return _read(EvalResult, path, plan, notify), _read(BenchResult, path, plan, notify)


def _read(kind: type[R], path: Path, plan: Plan, notify: Notify) -> R | None:
    # A report with a gap is better than none, so what does not fit is a warning, not an error.
    file = beside_plan(path, "eval" if kind is EvalResult else "bench")
    result = read_saved(kind, file, notify)
    if result is None:
        return None
    if isinstance(
        result, BenchResult
    ):  # with `-o`, another engine's workloads may have been written there
        workloads = tuple(
            timed for timed in result.workloads if timed.workload.engine == TRANSFORMERS
        )
        result = result.model_copy(update={"workloads": workloads})
    if result.model.fingerprint != plan.model.fingerprint:
        notify(Warned(f"Ignoring {file}: it was measured on a different model than {path}."))
        return None
    if result.order.ranking != plan.order.ranking:
        notify(Warned(f"Ignoring {file}: {path} removes other parts, or in another order."))
        return None
    if isinstance(result, EvalResult) and plan.recovery and result.recovered is None:
        notify(
            Warned(f"Ignoring {file}: it was measured before the blocks of {path} were recovered.")
        )
        return None
    planned = set(map(frozenset, plan.size_keys))
    entries = [entry for name in _LISTS for entry in getattr(result, name, ())]
    measured = {frozenset(size.removals) for entry in entries for size in entry.pruned}
    # A plan that was cut to fewer removals no longer tells its larger sizes from another plan's.
    unknown_sizes = {
        removals for removals in measured - planned if len(removals) <= len(plan.largest)
    }
    if unknown_sizes:
        notify(
            Warned(
                f"Ignoring {plural(len(unknown_sizes), 'size')} in {file} that {path} does not "
                f"have."
            )
        )
    if not measured & planned:
        return None
    changes = {
        name: tuple(of_sizes(getattr(result, name), planned))
        for name in _LISTS
        if hasattr(result, name)
    }
    if isinstance(result, BenchResult):
        (result,) = of_sizes([result], planned)
    else:
        changes["sizes"] = tuple(size for size in result.sizes if frozenset(size) in planned)
    return result.model_copy(update=changes).published()


def of_size(entries: Iterable[S], removals: tuple[int, ...]) -> S | None:
    """Return the entry for these removals, in any order, if there is one."""
    return next((entry for entry in entries if set(entry.removals) == set(removals)), None)
