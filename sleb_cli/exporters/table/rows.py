"""The rows of a table of plans: dense models, and each measured size of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_OF_DENSE = ("model", "revision", "evaluated in", "evaluated by", "timed in", "timed by")
SETTINGS = (
    "model",
    "revision",
    "removed from",
    "calibration",
    "seed",
    "protected",
    "searched in",
    "searched by",
    "search seconds",
    "windows",
    "items",
    "lm-eval",
    "evaluated in",
    "evaluated by",
    "timed in",
    "timed by",
    "plan",
)
_NOT_IN_METHOD = ("search seconds", "windows", "items", "plan")


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
        shared = {}
        for name in SETTINGS:
            values = {row[name] for row in self.rows if name in row}
            if len(values) == 1:
                shared[name] = values.pop()
        return shared

    def by_method(self) -> dict[str, list[Row]]:
        """Return the measured rows of pruned models by their methods, from few removals to many.

        A method is named with the settings that not all rows share.
        """
        left_out = {*self.shared, *_NOT_IN_METHOD}
        told = [name for name in (*METHOD[:3], *SETTINGS) if name not in left_out]
        methods: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row["removed"]):
            if row["removed"] and any(name in row for name in self.measured):
                method = ", ".join(row[name] for name in told if name in row)
                methods.setdefault(method, []).append(row)
        return methods

    def dense(self, row: Row) -> Row:
        """Return the dense model that was measured in the same settings as a row, if any."""
        for other in self.rows:
            if not other["removed"] and _agree(other, row):
                return other
        return {}


def plan_table(plans: Sequence[Findings]) -> PlanTable:
    """Tabulate measurements of several plans; a column holds one set of tokens or items, or one
    workload.
    """
    columns = _Columns(plans)
    dense: list[Row] = []
    pruned: list[Row] = []
    for findings in plans:
        settings = _settings(findings)
        measured = columns.dense(findings)
        if measured:
            of_dense = {name: settings[name] for name in _OF_DENSE if name in settings}
            _add_dense(dense, {"metric": "dense", "removed": 0, **measured, **of_dense})
        for size in findings.plan.size_keys:
            measured = columns.pruned(findings, size)
            if measured or size == findings.plan.largest:
                pruned.append({**_method(findings, size), **measured, **settings})
    rows = [*dense, *pruned]
    measured_anywhere = {}
    for name, form in columns.forms.items():
        if any(name in row for row in rows):
            measured_anywhere[name] = form
    return PlanTable(rows, measured_anywhere)


def _add_dense(rows: list[Row], new: Row) -> None:
    # Several plans may have measured the same dense model, on other texts or tasks.
    for row in rows:
        if _agree(row, new):
            row |= new | row
            return
    rows.append(new)


def _agree(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in SETTINGS if name in one and name in other)


def _method(findings: Findings, removals: SizeKey) -> Row:
    plan = findings.plan
    row: Row = {"metric": plan.search.metric, "removed": len(removals)}
    if plan.order.whole_blocks:
        row["strategy"] = plan.search.strategy + (", raced" if plan.search.fast else "")
        row["blocks"] = spans(removals)
    if plan.recovery:
        row["recovery"] = plan.recovery.models[-1][0]
    return row


def _settings(findings: Findings) -> Row:
    plan = findings.plan
    search = _by_name(search_settings(plan))
    windows = [f"{text.windows} of {text.sequence_length} tokens" for text in findings.texts]
    items = [f"{task.task} {len(task.doc_ids)}" for task in main_tasks(findings.tasks)]
    settings = {
        "model": plan.model.id,
        "revision": plan.model.revision,
        "removed from": f"{plan.order.count} {plan.order.parts}",
        "calibration": search.get("calibration"),
        "seed": search.get("seed"),
        "protected": search.get("protected blocks"),
        "searched in": search.get("data type and device"),
        "searched by": search.get("versions"),
        "search seconds": f"{plan.environment.seconds:.0f}",
        "windows": ", ".join(dict.fromkeys(windows)),
        "items": ", ".join(items),
        "plan": findings.file.name if findings.file.is_absolute() else str(findings.file),
    }
    if findings.evaluation:
        evaluation = _by_name(result_settings(findings.evaluation))
        settings["evaluated in"] = evaluation.get("data type and device")
        settings["evaluated by"] = evaluation.get("versions")
        settings["lm-eval"] = evaluation.get("lm-eval")
    if findings.benchmark:
        benchmark = _by_name(result_settings(findings.benchmark))
        settings["timed in"] = benchmark.get("data type and device")
        settings["timed by"] = benchmark.get("versions")
    return {name: value for name, value in settings.items() if value}


def _by_name(settings: Table) -> dict[str, str]:
    return {row[0]: row[1] for row in settings.rows}


class _Columns:
    """A column for each text, task and workload of several plans, with the numbers in them."""

    def __init__(self, plans: Sequence[Findings]) -> None:
        texts: dict[Any, TextResult] = {}
        tasks: dict[Any, TaskResult] = {}
        workloads: dict[Any, WorkloadResult] = {}
        for findings in plans:
            for text in findings.texts:
                texts[text.key] = text
            for task in main_tasks(findings.tasks):
                tasks[task.key] = task
            for workload in findings.workloads:
                workloads[workload.workload.identity] = workload
        self._averaged = {key for key, task in tasks.items() if _is_averaged(task)}
        self._names: dict[Any, str] = {}
        self.forms: dict[str, Callable[[float], str]] = {}

        def seen_in(text: TextResult) -> list[str]:
            return sorted({use for findings in plans for use in findings.seen_in(text)})

        for key, name in zip(texts, text_names([*texts.values()], seen_in), strict=True):
            self._add(key, f"perplexity, {name}", format_perplexity)
        for key, name in zip(tasks, task_names([*tasks.values()]), strict=True):
            self._add(key, name, "{:.3f}".format)
        self._add(MEAN, MEAN, "{:.3f}".format)
        for key, workload in workloads.items():
            self._add(key, f"{workload_name(workload)}, times as fast", "{:.2f}x".format)

    def _add(self, key: Any, name: str, form: Callable[[float], str]) -> None:
        self._names[key] = name
        self.forms[name] = form

    def dense(self, findings: Findings) -> Row:
        """Return the measurements of a plan's dense model."""
        row: Row = {}
        for text in findings.texts:
            row[self._names[text.key]] = (text.dense.perplexity, None)
        for task in main_tasks(findings.tasks):
            row[self._names[task.key]] = (task.dense.value, None)
        averaged = self._averaged_tasks(findings)
        if averaged:
            row[MEAN] = (_dense_mean(averaged), None)
        for workload in findings.workloads:
            row[self._names[workload.workload.identity]] = (1.0, None)
        return row

    def pruned(self, findings: Findings, removals: SizeKey) -> Row:
        """Return the measurements of a plan at one size."""
        row: Row = {}
        for text in findings.texts:
            row[self._names[text.key]] = _perplexity(text, removals)
        for task in main_tasks(findings.tasks):
            row[self._names[task.key]] = _score(task, removals)
        row[MEAN] = _mean(self._averaged_tasks(findings), removals)
        for workload in findings.workloads:
            timing = of_size(workload.pruned, removals)
            if timing:
                name = self._names[workload.workload.identity]
                row[name] = (timing.speedup, timing.interval)
        return {name: estimate for name, estimate in row.items() if estimate}

    def _averaged_tasks(self, findings: Findings) -> list[TaskResult]:
        """Return the tasks to average: several, and the same of each plan, or none."""
        tasks = [task for task in main_tasks(findings.tasks) if task.key in self._averaged]
        if len(tasks) < max(2, len(self._averaged)):
            return []
        return tasks


def _is_averaged(task: TaskResult) -> bool:
    return not is_canary(task) and all(size.lost is not None for size in task.pruned)


def _perplexity(text: TextResult, removals: SizeKey) -> Estimate | None:
    scores = of_size(text.pruned, removals)
    if scores is None:
        return None
    _, change = perplexity_change(scores)
    if change is None:
        return scores.perplexity, None
    dense = text.dense.perplexity
    return scores.perplexity, _interval(dense * (1 + change.low), dense * (1 + change.high))


def _score(task: TaskResult, removals: SizeKey) -> Estimate | None:
    scores = of_size(task.pruned, removals)
    if scores is None:
        return None
    change = scores.difference_interval
    if change is None:
        return scores.value, None
    ends = _interval(task.dense.value + change.low, task.dense.value + change.high)
    if scores.lost is not None:
        ends = _limited(ends)
    return scores.value, ends


def _mean(tasks: Sequence[TaskResult], removals: SizeKey) -> Estimate | None:
    share = retention(tasks, removals)
    if share is None:
        return None
    dense = _dense_mean(tasks)
    kept, ends = share
    if ends is None:
        return dense * kept, None
    return dense * kept, _limited(_interval(dense * ends.low, dense * ends.high))


def _dense_mean(tasks: Iterable[TaskResult]) -> float:
    return fmean(task.dense.value for task in tasks)


def _interval(low: float, high: float) -> Interval:
    # Not validated: intervals in a file can be so wide that this one is infinite.
    return Interval.model_construct(low=low, high=high)


def _limited(ends: Interval) -> Interval:
    """Limit an interval to the shares that a score can be."""
    return _interval(min(1.0, max(0.0, ends.low)), min(1.0, max(0.0, ends.high)))
