"""The rows of a table of plans: the dense model, and each size of a plan that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sleb_cli.engine.output.measured import of_size
from sleb_cli.exporters.findings import Findings
from sleb_cli.results import Interval, Removals, TaskResult, TextResult, WorkloadResult
from sleb_cli.tables.provenance import result_settings, search_settings
from sleb_cli.tables.quality import Estimate, is_canary, kept, main_tasks, perplexity_change, task_names, text_names
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Table
from sleb_cli.units import format_perplexity, spans

Row = dict[str, Any]
"""What is known, by column: text, a number, or an estimate; what is not known is missing."""

METHOD = ("metric", "strategy", "recovery", "removed", "blocks")
MEAN = "mean of tasks"
_OF_SEARCH = {
    "calibration": "calibration", "seed": "seed", "protected": "protected blocks",
    "searched in": "data type and device", "searched by": "versions",
}  # fmt: skip
"""The columns for settings of a search, and what these are called in the report."""
_OF_PLAN = ("removed from", *_OF_SEARCH, "search seconds", "windows", "items", "lm-eval", "plan")
SETTINGS = ("model", "revision", *_OF_PLAN[:-1], "evaluated in", "evaluated by", "timed in", "timed by", "plan")


@dataclass(frozen=True)
class PlanTable:
    """Rows in the columns METHOD, `measured`, each with the form of its numbers, and SETTINGS."""

    rows: Sequence[Row]
    measured: dict[str, Callable[[float], str]]

    @property
    def shared(self) -> dict[str, str]:
        """The settings that are the same wherever they are known."""
        found = {name: {row[name] for row in self.rows if name in row} for name in SETTINGS}
        return {name: values.pop() for name, values in found.items() if len(values) == 1}

    def method(self, row: Row) -> str:
        """Return the method of a row, with the settings that tell it from others."""
        settings = [
            name for name in SETTINGS if name not in {*self.shared, "search seconds", "windows", "items", "plan"}
        ]
        return ", ".join(row[name] for name in (*METHOD[:3], *settings) if name in row)

    def dense(self, row: Row) -> Row:
        """Return the dense model that was measured as a row was."""
        return next((each for each in self.rows if not each["removed"] and _agree(each, row)), {})


def plan_table(found: Sequence[Findings]) -> PlanTable:
    """Return what was measured of these plans: what is in one column is of the same tokens, items or workload."""
    measures, dense, pruned = _Measures(found), list[Row](), list[Row]()
    for each in found:
        settings = _settings(each)
        of_dense = {name: value for name, value in settings.items() if name not in _OF_PLAN}
        if measured := measures.of(each, ()):
            _add_dense(dense, {"metric": "dense", "removed": 0} | measured | of_dense)
        for size in each.plan.by_size:
            if (measured := measures.of(each, size)) or size == each.plan.largest:
                pruned.append(_method(each, size) | measured | settings)
    rows = [*dense, *pruned]
    return PlanTable(rows, {name: form for name, form in measures.forms.items() if any(name in row for row in rows)})


def _add_dense(rows: list[Row], new: Row) -> None:
    """Add a dense model, or what was measured of it to the row of the same one."""
    if row := next((row for row in rows if _agree(row, new)), None):
        row |= new | row
    else:
        rows.append(new)


def _agree(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in SETTINGS if name in one and name in other)


def _method(found: Findings, removals: Removals) -> Row:
    plan, search = found.plan, found.plan.search
    row = {"metric": search.metric, "removed": len(removals)}
    if not plan.experts:
        row |= {"strategy": search.strategy + ", raced" * search.fast, "blocks": spans(removals)}
    return row | ({"recovery": plan.recovery.models[-1][0]} if plan.recovery else {})


def _settings(found: Findings) -> Row:
    plan, file, (_, whole, parts) = found.plan, found.file, found.removed
    of_report = _told(search_settings(plan))
    row: Row = {name: of_report.get(its_name) for name, its_name in _OF_SEARCH.items()}
    row |= {"model": plan.model.id, "revision": plan.model.revision, "removed from": f"{whole} {parts}"}
    row |= {"search seconds": f"{plan.environment.seconds:.0f}", "plan": file.name if file.is_absolute() else str(file)}
    windows = [f"{text.windows} of {text.sequence_length} tokens" for text in found.texts]
    row["windows"] = ", ".join(dict.fromkeys(windows))
    row["items"] = ", ".join(f"{task.task} {len(task.doc_ids)}" for task in main_tasks(found.tasks))
    for done, result in (("evaluated", found.evaluation), ("timed", found.benchmark)):
        told = _told(result_settings(result)) if result else {}
        row |= {f"{done} in": told.get("data type and device"), f"{done} by": told.get("versions")}
        row["lm-eval"] = row.get("lm-eval") or told.get("lm-eval")
    return {name: value for name, value in row.items() if value}


def _told(settings: Table) -> dict[str, str]:
    return {row[0]: row[1] for row in settings.rows}


class _Measures:
    """The texts, tasks and workloads that were measured of several plans, and the columns that they have."""

    def __init__(self, found: Sequence[Findings]) -> None:
        def made_on(text: TextResult) -> list[str]:
            return sorted({how for each in found for how in each.made_on(text)})

        texts = {text.key: text for each in found for text in each.texts}
        tasks = {task.key: task for each in found for task in main_tasks(each.tasks)}
        timed = {result.workload.identity: result for each in found for result in each.workloads}
        self.averaged = {key for key, task in tasks.items() if _is_averaged(task)}
        kinds: list[tuple[dict[Any, Any], list[str], Callable[[float], str]]] = [
            (texts, [f"perplexity, {name}" for name in text_names([*texts.values()], made_on)], format_perplexity),
            (tasks, task_names([*tasks.values()]), "{:.3f}".format),
            ({MEAN: None}, [MEAN], "{:.3f}".format),
            (timed, [f"{workload_name(result)}, times as fast" for result in timed.values()], "{:.2f}x".format),
        ]
        self.columns = {key: name for results, names, _ in kinds for key, name in zip(results, names, strict=True)}
        self.forms = {name: form for _, names, form in kinds for name in names}

    def of(self, found: Findings, removals: Removals) -> Row:
        """Return what was measured without these parts."""
        tasks = main_tasks(found.tasks)
        averaged = [task for task in tasks if task.key in self.averaged]
        values: dict[Any, Estimate | None] = {text.key: _perplexity(text, removals) for text in found.texts}
        values |= {task.key: _score(task, removals) for task in tasks}
        values |= {MEAN: _mean(averaged, removals) if 1 < len(averaged) == len(self.averaged) else None}
        values |= {result.workload.identity: _speedup(result, removals) for result in found.workloads}
        return {self.columns[key]: value for key, value in values.items() if value}


def _is_averaged(task: TaskResult) -> bool:
    """Whether a task counts items that are right, and is not made to break."""
    return not is_canary(task) and all(size.lost is not None for size in task.pruned)


def _perplexity(text: TextResult, removals: Removals) -> Estimate | None:
    dense, own = text.dense.perplexity, of_size(text.pruned, removals)
    if own:
        return own.perplexity, _at(perplexity_change(own)[1], lambda change: dense * (1 + change))
    return None if removals else (dense, None)


def _score(task: TaskResult, removals: Removals) -> Estimate | None:
    dense, own = task.dense.value, of_size(task.pruned, removals)
    if own:
        least, most = (0.0, 1.0) if own.lost is not None else (-math.inf, math.inf)
        return own.value, _at(own.difference_interval, lambda change: min(most, max(least, dense + change)))
    return None if removals else (dense, None)


def _mean(tasks: Sequence[TaskResult], removals: Removals) -> Estimate | None:
    dense = fmean(task.dense.value for task in tasks)
    if removals and (share := kept(tasks, removals)):
        return dense * share[0], _at(share[1], lambda end: min(1.0, max(0.0, dense * end)))
    return None if removals else (dense, None)


def _speedup(result: WorkloadResult, removals: Removals) -> Estimate | None:
    own = of_size(result.pruned, removals)
    return (own.speedup, own.interval) if own else None if removals else (1.0, None)


def _at(interval: Interval | None, place: Callable[[float], float]) -> Interval | None:
    return interval and Interval.model_construct(low=place(interval.low), high=place(interval.high))
