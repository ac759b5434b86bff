"""The rows of a table of plans: dense models, and each measured size of a plan."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.lines import (
    MEAN,
    Line,
    corpus_line,
    mean_line,
    search_lines,
    speed_line,
    task_line,
    text_line,
)
from sleb_cli.order import SizeKey
from sleb_cli.results import CorpusResult, TaskResult, TextResult
from sleb_cli.tables.provenance import result_settings, search_settings
from sleb_cli.tables.quality import corpus_names, is_canary, main_tasks, task_names, text_names
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Column, Table
from sleb_cli.units import format_perplexity, spans

Row = dict[str, Any]
"""Text, numbers and estimates by column; unknown ones are missing."""

METHOD = ("metric", "strategy", "recovery", "removed", "blocks")
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
NOT_IN_METHOD = ("search seconds", "windows", "items", "plan")


@dataclass(frozen=True)
class PlanTable:
    """Rows with the columns METHOD, `measured` (each with its formatter) and SETTINGS."""

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
        left_out = {*self.shared, *NOT_IN_METHOD}
        told = [name for name in (*METHOD[:3], *SETTINGS) if name not in left_out]
        methods: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row["removed"]):
            if row["removed"] and any(name in row for name in self.measured):
                method = ", ".join(row[name] for name in told if name in row)
                methods.setdefault(method, []).append(row)
        return methods

    def has_intervals(self, name: str) -> bool:
        """Whether a model's measurement in this column has an interval."""
        return any(row[name][1] for row in self.rows if name in row)

    def dense(self, row: Row) -> Row:
        """Return the dense model that was measured in the same settings as a row, if any."""
        for other in self.rows:
            if not other["removed"] and _agree(other, row):
                return other
        return {}


def plan_table(plans: Sequence[Findings]) -> PlanTable:
    """Tabulate measurements of plans, a column for each set of tokens or items, or workload."""
    columns = _columns(plans)
    averaged: set[Hashable] = set()
    for findings in plans:
        averaged.update(_averaged(findings))
    dense: list[Row] = []
    pruned: list[Row] = []
    for findings in plans:
        settings = _settings(findings)
        lines = [line for line in _lines(findings, averaged) if line.key in columns]
        of_dense = {name: settings[name] for name in _OF_DENSE if name in settings}
        if lines:
            measured = _at_size(lines, 0, columns)
            _add_dense(dense, {"metric": "dense", "removed": 0, **measured, **of_dense})
        for key in findings.plan.size_keys:
            measured = _at_size(lines, len(key), columns)
            if measured or key == findings.plan.largest:
                pruned.append({**_method(findings, key), **measured, **settings})
    rows = [*dense, *pruned]
    filled = set().union(*rows)
    return PlanTable(rows, {name: form for name, form in columns.values() if name in filled})


def _columns(plans: Sequence[Findings]) -> dict[Hashable, Column]:
    """Return the columns for texts, tasks, means, corpora and workloads, by keys of lines."""
    texts: dict[Hashable, TextResult] = {}
    tasks: dict[Hashable, TaskResult] = {}
    corpora: dict[Hashable, CorpusResult] = {}
    speeds: dict[Hashable, Column] = {}
    for findings in plans:
        for text in findings.texts:
            texts[text.key] = text
        for task in main_tasks(findings.tasks):
            tasks[task.key] = task
        for corpus in findings.corpora:
            corpora[corpus.key] = corpus
        for result in findings.workloads:
            name = f"{workload_name(result)}, times as fast"
            speeds[result.workload.identity] = (name, "{:.2f}x".format)
    columns = _search_columns(plans)
    names = text_names(list(texts.values()), partial(_seen_in, plans))
    for key, name in zip(texts, names, strict=True):
        columns[key] = (f"perplexity, {name}", format_perplexity)
    for key, name in zip(tasks, task_names(list(tasks.values())), strict=True):
        columns[key] = (name, "{:.3f}".format)
    columns[MEAN] = (MEAN, "{:.3f}".format)
    for key, name in zip(corpora, corpus_names(list(corpora.values())), strict=True):
        columns[key] = (name, "{:.3f}".format)
    return {**columns, **speeds}


def _search_columns(plans: Sequence[Findings]) -> dict[Hashable, Column]:
    """Return the columns for the texts of searches, unless every plan was evaluated."""
    columns: dict[Hashable, Column] = {}
    if all(findings.evaluation for findings in plans):
        return columns
    texts = {str(findings.plan.calibration) for findings in plans}
    keys: dict[str, Hashable] = {}
    for findings in plans:
        text = findings.plan.calibration
        for line in search_lines(findings.plan):
            name = f"perplexity, {line.name}"
            if len(texts) > 1:
                name += f", {text}"
            if keys.setdefault(name, line.key) != line.key:
                name += f" (tokens {text.tokens_sha256[:8]})"
            columns[line.key] = (name, format_perplexity)
    return columns


def _seen_in(plans: Sequence[Findings], text: TextResult) -> list[str]:
    """Return where the plans that were measured on a text used it before."""
    uses = []
    for findings in plans:
        if any(own.key == text.key for own in findings.texts):
            uses.append(set(findings.seen_in(text)))
    by_any = set[str]().union(*uses)
    by_all = by_any.intersection(*uses)
    by_some = by_any - by_all
    return [*sorted(by_all), *(f"{use} by some plans" for use in sorted(by_some))]


def _lines(findings: Findings, averaged: Collection[Hashable]) -> list[Line]:
    """Return all that was measured of a plan."""
    lines = [text_line(text.text, text) for text in findings.texts]
    lines += [task_line(task) for task in main_tasks(findings.tasks)]
    tasks = _averaged(findings)
    # A mean of other tasks would not compare.
    if len(tasks) == len(averaged) > 1:
        lines.append(mean_line(findings.plan, list(tasks.values())))
    lines += search_lines(findings.plan)
    lines += [corpus_line(corpus) for corpus in findings.corpora]
    lines += [speed_line(result) for result in findings.workloads]
    return lines


def _averaged(findings: Findings) -> dict[Hashable, TaskResult]:
    """Return the tasks that the mean is taken over, by key: they count right items."""
    tasks: dict[Hashable, TaskResult] = {}
    for task in main_tasks(findings.tasks):
        if not is_canary(task) and all(size.lost is not None for size in task.pruned):
            tasks[task.key] = task
    return tasks


def _at_size(lines: Sequence[Line], size: int, columns: Mapping[Hashable, Column]) -> Row:
    row = {}
    for line in lines:
        if size in line.values:
            name, _ = columns[line.key]
            row[name] = line.values[size]
    return row


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
    items += [f"{corpus.corpus} {corpus.queries or corpus.texts}" for corpus in findings.corpora]
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
        "items": ", ".join(dict.fromkeys(items)),
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
