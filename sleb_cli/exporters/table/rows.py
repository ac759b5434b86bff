"""The rows of a table of plans: dense models, and each measured size of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sleb_cli.engine.output.measured import of_size
from sleb_cli.exporters.findings import Findings
from sleb_cli.order import SizeKey
from sleb_cli.results import Interval, TaskResult, TextResult, WorkloadResult
from sleb_cli.tables.provenance import result_settings, search_settings
from sleb_cli.tables.quality import (
    Estimate,
    is_canary,
    main_tasks,
    perplexity_change,
    retention,
    task_names,
    text_names,
)
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Table
from sleb_cli.units import format_perplexity, spans

Row = dict[str, Any]
"""Text, numbers and estimates by column; unknown ones are missing."""

METHOD = ("metric", "strategy", "recovery", "removed", "blocks")
MEAN = "mean of tasks"
_OF_SEARCH = {
    "calibration": "calibration", "seed": "seed", "protected": "protected blocks",
    "searched in": "data type and device", "searched by": "versions",
}  # fmt: skip
"""The columns for settings of a search, by their names in the report."""
_OF_PLAN = ("removed from", *_OF_SEARCH, "search seconds", "windows", "items", "lm-eval", "plan")
SETTINGS = (
    "model",
    "revision",
    *_OF_PLAN[:-1],
    "evaluated in",
    "evaluated by",
    "timed in",
    "timed by",
    "plan",
)


@dataclass(frozen=True)
class PlanTable:
    """Rows with the columns METHOD, `measured` (each with the function that formats it) and
    SETTINGS.
    """

    rows: Sequence[Row]
    measured: dict[str, Callable[[float], str]]

    @property
    def shared(self) -> dict[str, str]:
        """The settings that have the same value in every row that has one."""
        values = {name: {row[name] for row in self.rows if name in row} for name in SETTINGS}
        return {name: distinct.pop() for name, distinct in values.items() if len(distinct) == 1}

    def method(self, row: Row) -> str:
        """Name the method of a row, with the settings that not all rows share."""
        settings = [
            name
            for name in SETTINGS
            if name not in {*self.shared, "search seconds", "windows", "items", "plan"}
        ]
        return ", ".join(row[name] for name in (*METHOD[:3], *settings) if name in row)

    def dense(self, row: Row) -> Row:
        """Return the dense model that was measured in the same settings as a row."""
        return next(
            (other for other in self.rows if not other["removed"] and _agree(other, row)), {}
        )


def plan_table(plans: Sequence[Findings]) -> PlanTable:
    """Tabulate measurements of several plans; a column holds one set of tokens or items, or one
    workload.
    """
    measures, dense, pruned = _Measures(plans), list[Row](), list[Row]()
    for findings in plans:
        settings = _settings(findings)
        dense_settings = {name: value for name, value in settings.items() if name not in _OF_PLAN}
        if measured := measures.measured_without(findings, ()):
            _add_dense(dense, {"metric": "dense", "removed": 0} | measured | dense_settings)
        for size in findings.plan.size_keys:
            if (
                measured := measures.measured_without(findings, size)
            ) or size == findings.plan.largest:
                pruned.append(_method(findings, size) | measured | settings)
    rows = [*dense, *pruned]
    return PlanTable(
        rows,
        {name: form for name, form in measures.forms.items() if any(name in row for row in rows)},
    )


def _add_dense(rows: list[Row], new: Row) -> None:
    # Several plans may have measured the same dense model, on other texts or tasks.
    if row := next((row for row in rows if _agree(row, new)), None):
        row |= new | row
    else:
        rows.append(new)


def _agree(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in SETTINGS if name in one and name in other)


def _method(findings: Findings, removals: SizeKey) -> Row:
    plan, search = findings.plan, findings.plan.search
    row = {"metric": search.metric, "removed": len(removals)}
    if plan.order.whole_blocks:
        row |= {"strategy": search.strategy + ", raced" * search.fast, "blocks": spans(removals)}
    return row | ({"recovery": plan.recovery.models[-1][0]} if plan.recovery else {})


def _settings(findings: Findings) -> Row:
    plan, file = findings.plan, findings.file
    in_report = _by_name(search_settings(plan))
    row: Row = {name: in_report.get(report_name) for name, report_name in _OF_SEARCH.items()}
    row |= {
        "model": plan.model.id,
        "revision": plan.model.revision,
        "removed from": f"{plan.order.count} {plan.order.parts}",
    }
    row |= {
        "search seconds": f"{plan.environment.seconds:.0f}",
        "plan": file.name if file.is_absolute() else str(file),
    }
    windows = [f"{text.windows} of {text.sequence_length} tokens" for text in findings.texts]
    row["windows"] = ", ".join(dict.fromkeys(windows))
    row["items"] = ", ".join(
        f"{task.task} {len(task.doc_ids)}" for task in main_tasks(findings.tasks)
    )
    for done, result in (("evaluated", findings.evaluation), ("timed", findings.benchmark)):
        settings = _by_name(result_settings(result)) if result else {}
        row |= {
            f"{done} in": settings.get("data type and device"),
            f"{done} by": settings.get("versions"),
        }
        row["lm-eval"] = row.get("lm-eval") or settings.get("lm-eval")
    return {name: value for name, value in row.items() if value}


def _by_name(settings: Table) -> dict[str, str]:
    return {row[0]: row[1] for row in settings.rows}


class _Measures:
    """The texts, tasks and workloads of several plans, and their columns."""

    def __init__(self, plans: Sequence[Findings]) -> None:
        def seen_in(text: TextResult) -> list[str]:
            return sorted({use for findings in plans for use in findings.seen_in(text)})

        texts = {text.key: text for findings in plans for text in findings.texts}
        tasks = {task.key: task for findings in plans for task in main_tasks(findings.tasks)}
        timed = {
            result.workload.identity: result for findings in plans for result in findings.workloads
        }
        self.averaged = {key for key, task in tasks.items() if _is_averaged(task)}
        kinds: list[tuple[dict[Any, Any], list[str], Callable[[float], str]]] = [
            (
                texts,
                [f"perplexity, {name}" for name in text_names([*texts.values()], seen_in)],
                format_perplexity,
            ),
            (tasks, task_names([*tasks.values()]), "{:.3f}".format),
            ({MEAN: None}, [MEAN], "{:.3f}".format),
            (
                timed,
                [f"{workload_name(result)}, times as fast" for result in timed.values()],
                "{:.2f}x".format,
            ),
        ]
        self.columns = {
            key: name
            for results, names, _ in kinds
            for key, name in zip(results, names, strict=True)
        }
        self.forms = {name: form for _, names, form in kinds for name in names}

    def measured_without(self, findings: Findings, removals: SizeKey) -> Row:
        """Return the measurements of a plan at one size."""
        tasks = main_tasks(findings.tasks)
        averaged = [task for task in tasks if task.key in self.averaged]
        values: dict[Any, Estimate | None] = {
            text.key: _perplexity(text, removals) for text in findings.texts
        }
        values |= {task.key: _score(task, removals) for task in tasks}
        values |= {
            MEAN: _mean(averaged, removals) if 1 < len(averaged) == len(self.averaged) else None
        }
        values |= {
            result.workload.identity: _speedup(result, removals) for result in findings.workloads
        }
        return {self.columns[key]: value for key, value in values.items() if value}


def _is_averaged(task: TaskResult) -> bool:
    return not is_canary(task) and all(size.lost is not None for size in task.pruned)


def _perplexity(text: TextResult, removals: SizeKey) -> Estimate | None:
    dense, scores = text.dense.perplexity, of_size(text.pruned, removals)
    if scores:
        return scores.perplexity, _map_ends(
            perplexity_change(scores)[1], lambda change: dense * (1 + change)
        )
    return None if removals else (dense, None)


def _score(task: TaskResult, removals: SizeKey) -> Estimate | None:
    dense, scores = task.dense.value, of_size(task.pruned, removals)
    if scores:
        low, high = (0.0, 1.0) if scores.lost is not None else (-math.inf, math.inf)
        return scores.value, _map_ends(
            scores.difference_interval, lambda change: min(high, max(low, dense + change))
        )
    return None if removals else (dense, None)


def _mean(tasks: Sequence[TaskResult], removals: SizeKey) -> Estimate | None:
    dense = fmean(task.dense.value for task in tasks)
    if removals and (share := retention(tasks, removals)):
        return dense * share[0], _map_ends(share[1], lambda end: min(1.0, max(0.0, dense * end)))
    return None if removals else (dense, None)


def _speedup(result: WorkloadResult, removals: SizeKey) -> Estimate | None:
    timing = of_size(result.pruned, removals)
    return (timing.speedup, timing.interval) if timing else None if removals else (1.0, None)


def _map_ends(interval: Interval | None, change: Callable[[float], float]) -> Interval | None:
    return interval and Interval.model_construct(
        low=change(interval.low), high=change(interval.high)
    )
