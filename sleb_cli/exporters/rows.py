"""Export what was found and measured as rows, one number each, for notebooks, spreadsheets and databases."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any, NamedTuple

from sleb_cli.exporters.findings import Findings, read_findings
from sleb_cli.results import Interval
from sleb_cli.tables.quality import items_of, task_settings
from sleb_cli.tables.speed import workload_name
from sleb_plugins.exporter import Exporter, Pruning

_DIVERGENCES = ("mean", "median", "p90", "p99", "maximum", "same_top", "accepted")
_TIMES = ("ttft_ms", "tpot_ms", "e2el_ms")
_SIZES = ("blocks", "parameters", "weights_bytes", "load_seconds")


class Row(NamedTuple):
    """A number, with its 95 % interval if it has one, as the records of the plan and the results name it.

    `kind` is step, candidate, text, task, workload or size; `of` says which one; `removals` are joined by `+`.
    """

    kind: str
    of: str
    removed: int
    removals: str
    figure: str
    value: float
    low: float | None = None
    high: float | None = None


class Csv(Exporter):
    """A table with a header, as in RFC 4180 but with plain line ends."""

    name = "csv"
    description = "every step, score, evaluation and benchmark of a plan, one number per row"
    needs_model = False

    def export(self, pruning: Pruning) -> str:
        """Return the table."""
        table = StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(_rows(read_findings(pruning)))
        return table.getvalue()


def _rows(findings: Findings) -> Iterator[Row]:
    """Yield all rows whose number is known; the dense model has no removals."""
    yield from _steps(findings)
    yield from _texts(findings)
    yield from _tasks(findings)
    yield from _speeds(findings)


def _texts(findings: Findings) -> Iterator[Row]:
    for name, text in zip(findings.text_names, findings.texts, strict=True):
        for removals, scores in _models(text):
            yield from _figures("text", name, removals, scores, ["perplexity"])
            if removals:
                yield _row("text", name, removals, "log_ratio", scores.log_ratio, scores.interval)
                yield from _figures("text", name, removals, scores.divergence, _DIVERGENCES, "divergence_")


def _tasks(findings: Findings) -> Iterator[Row]:
    for task in findings.tasks:
        metric = task.metric if task.filter in ("", "none") else f"{task.metric} ({task.filter})"
        runs = {each.items_sha256 for each in findings.tasks if each.task == task.task}
        items = [items_of(task)] if len(runs) > 1 else []
        name = ", ".join([task.task, *task_settings(task), *items])
        for removals, scores in _models(task):
            yield _row("task", name, removals, metric, scores.value, scores.interval)
            if removals:
                change = scores.difference_interval
                yield _row("task", name, removals, f"{metric} difference", scores.difference, change)


def _speeds(findings: Findings) -> Iterator[Row]:
    for result in findings.workloads:
        name = workload_name(result)
        for removals, timing in _models(result):
            yield _row("workload", name, removals, "tokens_per_second", timing.tokens_per_second)
            for time in _TIMES:
                if taken := getattr(timing, time):
                    yield _row("workload", name, removals, f"median_{time}", taken.median)
            if removals:
                yield _row("workload", name, removals, "speedup", timing.speedup, timing.interval)
    if benchmark := findings.benchmark:
        for size in (benchmark.dense, *benchmark.pruned):
            yield from _figures("size", findings.short_model, size.removals, size, _SIZES)


def _steps(findings: Findings) -> Iterator[Row]:
    """Yield the score of each size, and of each candidate for the block that it removes."""
    plan = findings.plan
    yield _row("step", plan.search.metric, (), "perplexity", plan.dense.perplexity)
    for step, removals in zip(plan.steps, plan.by_size, strict=True):
        yield _row("step", plan.search.metric, removals, "score", step.score)
        yield _row("step", plan.search.metric, removals, "perplexity", step.perplexity)
        for block, score in step.scores.items():
            if score is not None:
                yield _row("candidate", str(block), removals, "score", score)


def _models(measured: Any) -> Iterator[tuple[Sequence[int], Any]]:
    yield (), measured.dense
    yield from ((entry.removals, entry) for entry in measured.pruned)


def _figures(
    kind: str, of: str, removals: Sequence[int], record: Any, names: Sequence[str], prefix: str = ""
) -> Iterator[Row]:
    for name in names:
        if (value := getattr(record, name)) is not None:
            yield _row(kind, of, removals, prefix + name, value)


def _row(
    kind: str, of: str, removals: Sequence[int], figure: str, value: float, interval: Interval | None = None
) -> Row:
    ends = (interval.low, interval.high) if interval else (None, None)
    return Row(kind, of, len(removals), "+".join(map(str, removals)), figure, value, *ends)
