"""What `sleb eval` and `sleb bench` measured of a plan, kept beside it, for exporters and model cards."""

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

_PARTS = ("texts", "tasks", "workloads")

S = TypeVar("S", PrunedTextScores, PrunedTaskScores, PrunedTiming, ModelSize)


def measured_of_plan(path: Path, plan: Plan, notify: Notify) -> tuple[EvalResult | None, BenchResult | None]:
    """Return what was measured of the sizes of a plan, without local folders; None for what was not.

    What cannot be read or belongs to another model is left out, with a warning: a report with a gap is better than
    none.
    """
    return _measured(EvalResult, path, plan, notify), _measured(BenchResult, path, plan, notify)


def _measured(kind: type[R], path: Path, plan: Plan, notify: Notify) -> R | None:
    file = beside_plan(path, "eval" if kind is EvalResult else "bench")
    result = read_saved(kind, file, notify)
    if result is None:
        return None
    if isinstance(result, BenchResult):  # `-o` may have put those of another engine there
        own = tuple(each for each in result.workloads if each.workload.engine == TRANSFORMERS)
        result = result.model_copy(update={"workloads": own})
    if result.model.fingerprint != plan.model.fingerprint:
        notify(Warned(f"Ignoring {file}: it was measured on a different model than {path}."))
        return None
    if (result.experts and result.experts.ranking) != (plan.experts and plan.experts.ranking):
        notify(Warned(f"Ignoring {file}: {path} removes other parts, or in another order."))
        return None
    if isinstance(result, EvalResult) and plan.recovery and result.recovered is None:
        notify(Warned(f"Ignoring {file}: it was measured before the blocks of {path} were recovered."))
        return None
    planned = set(map(frozenset, plan.by_size))
    parts = [part for name in _PARTS for part in getattr(result, name, ())]
    measured = {frozenset(entry.removals) for part in parts for entry in part.pruned}
    # A plan that was cut to fewer removals no longer tells its larger sizes from another plan's.
    strangers = {removals for removals in measured - planned if len(removals) <= len(plan.largest)}
    if strangers:
        notify(Warned(f"Ignoring {plural(len(strangers), 'size')} in {file} that {path} does not have."))
    if not measured & planned:
        return None
    changes = {name: tuple(of_sizes(getattr(result, name), planned)) for name in _PARTS if hasattr(result, name)}
    if isinstance(result, BenchResult):
        (result,) = of_sizes([result], planned)
    else:
        changes["sizes"] = tuple(size for size in result.sizes if frozenset(size) in planned)
    return result.model_copy(update=changes).published()


def of_size(entries: Iterable[S], removals: tuple[int, ...]) -> S | None:
    """Return the entry for these removals, in whatever order it names them; None if there is none."""
    return next((entry for entry in entries if set(entry.removals) == set(removals)), None)
