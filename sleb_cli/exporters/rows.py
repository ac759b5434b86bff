"""Export what was found and measured as rows, one number each, for notebooks, spreadsheets and databases."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import StringIO

from sleb_cli.exporters.findings import Findings, read_findings
from sleb_cli.plan import ExpertPlan, Plan
from sleb_cli.records import Record
from sleb_cli.results import Removals
from sleb_plugins.exporter import Exporter, Pruning

HEADER = ("kind", "of", "removed", "removals", "figure", "value")
"""The columns: a `value`, and what it is.

`kind` is step, candidate, text, task, workload or size, and `of` says which one; an expert is named by its block and
number: 3.17. `removals` are joined by `+`: blocks, or places in the order of each block's experts. The dense model has
none. `figure` is named as in the records of the plan and the results: divergence_mean, interval_low.
"""

Row = tuple[str, str, int, str, str, float]


class Csv(Exporter):
    """A table with a header, as in RFC 4180 but with plain line ends."""

    name = "csv"
    description = "every step, score, evaluation and benchmark of a plan, one number per row"
    needs_model = False

    def export(self, pruning: Pruning) -> str:
        """Return the table."""
        table = StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(_rows(read_findings(pruning)))
        return table.getvalue()


def _rows(findings: Findings) -> Iterator[Row]:
    yield from _numbers("step", findings.plan.search.metric, (), findings.plan.dense)
    yield from _of_experts(findings.plan.experts) if findings.plan.experts else _of_blocks(findings.plan)
    for kind, rows in findings.scored.items():
        for of, _, record in rows:
            yield from _numbers(kind, of, getattr(record, "removals", ()), record)
    if benchmark := findings.benchmark:
        for size in (benchmark.dense, *benchmark.pruned):
            yield from _numbers("size", findings.short_model, size.removals, size)


def _of_blocks(plan: Plan) -> Iterator[Row]:
    for step, removals in zip(plan.steps, plan.by_size, strict=True):
        yield from _numbers("step", plan.search.metric, removals, step)
        for block, score in step.scores.items():
            if score is not None:
                yield _row("candidate", str(block), _scored(plan, removals, block), "score", score)


def _of_experts(found: ExpertPlan) -> Iterator[Row]:
    for text in found.texts:
        named = f"{text.text}{', held out' if text.held_out else ''}"
        yield from _numbers("step", named, range(found.fewer), text)
    for order in found.blocks:
        for expert, score in enumerate(order.scores):
            yield _row("candidate", f"{order.block}.{expert}", (), "score", score)


def _scored(plan: Plan, removals: Removals, block: int) -> Removals:
    """Return the blocks without which a candidate of a step was scored; `removals` are those that the step removed."""
    match plan.search.strategy:
        case "oneshot":
            return (block,)
        case "contiguous":
            return tuple(range(block - len(removals) + 1, block + 1))
    return (*removals[:-1], block)


def _numbers(kind: str, of: str, removals: Sequence[int], record: Record, prefix: str = "") -> Iterator[Row]:
    """Yield every number in a record, and in the records in it."""
    for name, value in record:
        if isinstance(value, Record):
            yield from _numbers(kind, of, removals, value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield _row(kind, of, removals, prefix + name, value)


def _row(kind: str, of: str, removals: Sequence[int], figure: str, value: float) -> Row:
    return kind, of, len(removals), "+".join(map(str, removals)), figure, value
