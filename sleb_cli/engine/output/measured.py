"""The kept results of a plan, for exporters and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Reversible
from pathlib import Path
from typing import TypeVar

from sleb_cli.engine.model.source import ModelSource, locate_checkpoint
from sleb_cli.events import Notify, Warned
from sleb_cli.plan import Plan
from sleb_cli.records import same_fingerprint
from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import (
    BenchResult,
    EvalResult,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
)
from sleb_cli.saved_results import R, read_results, results_folder
from sleb_cli.units import plural

S = TypeVar("S", PrunedTextScores, PrunedTaskScores, PrunedTiming, ModelSize)


def read_measurements(
    path: Path, plan: Plan, notify: Notify
) -> tuple[EvalResult | None, BenchResult | None]:
    """Read the results for the sizes of a plan, without local folders; None if there are none."""
    checkpoint = locate_checkpoint(path, plan)
    evaluations = results_of_plan(EvalResult, path, plan, notify, checkpoint)
    benchmarks = results_of_plan(BenchResult, path, plan, notify)
    return join_results(evaluations.values()), join_results(benchmarks.values())


def results_of_plan(
    kind: type[R], path: Path, plan: Plan, notify: Notify, checkpoint: ModelSource | None = None
) -> dict[Path, R]:
    """Read the results for the sizes of a plan by file, the oldest first, without local folders.

    With the `checkpoint` that holds the plan, they must be of the weights that it has now. A report
    with a gap is better than none, so what does not fit the plan is a warning.
    """
    folder = results_folder(path)
    planned = {frozenset(size) for size in plan.size_keys}
    fitting, ignored = {}, 0
    for file, result in read_results(kind, folder, notify).items():
        is_of_plan = (
            result.order.ranking == plan.order.ranking
            and same_fingerprint(result.model.fingerprint, plan.model.fingerprint)
            and _has_weights_of(result, plan, checkpoint)
        )
        if not is_of_plan:
            ignored += 1
        elif any(frozenset(size) in planned for size in result.size_keys):
            fitting[file] = result.of_sizes(planned).published()
        elif any(len(size) <= len(plan.largest) for size in result.size_keys):
            # A plan that was cut to fewer removals does not know its larger sizes any more.
            ignored += 1
    if ignored:
        notify(
            Warned(
                f"Ignoring {plural(ignored, 'result')} in {folder}: of another model or other "
                f"weights, or without other parts than {path} removes."
            )
        )
    return fitting


def _has_weights_of(result: R, plan: Plan, checkpoint: ModelSource | None) -> bool:
    if not isinstance(result, EvalResult):
        return True  # speed does not depend on them
    if checkpoint and checkpoint.fingerprint != plan.checkpoint:  # trained since it was written
        return result.recovered == checkpoint.content_hash
    return (result.recovered is None) == (plan.recovery is None)


def join_results(results: Reversible[R]) -> R | None:
    """Join the results in the setting of the last one; the last result of each part counts.

    Of benchmarks, only runs of transformers count, since other engines may have other weights.
    """
    joined = None
    for result in reversed(results):
        if isinstance(result, BenchResult) and any(
            timed.workload.engine != TRANSFORMERS for timed in result.workloads
        ):
            continue
        if joined is None:
            joined = result
        elif joined.key == result.key:
            joined = joined.merged_with(result)
    return joined


def of_size(entries: Iterable[S], removals: tuple[int, ...]) -> S | None:
    """Return the entry for these removals, in any order, if there is one."""
    return next((entry for entry in entries if set(entry.removals) == set(removals)), None)
