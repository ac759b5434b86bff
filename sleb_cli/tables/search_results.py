"""What did a search find? Its steps, the removed blocks, and a text by both models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sleb_cli.names import public_source
from sleb_cli.plan import ExpertPlan, Plan, RecoveryRecord, SampleGeneration
from sleb_cli.tables.table import PERPLEXITY, Columns, Table, tabulate
from sleb_cli.units import format_bytes, format_change, format_count, format_perplexity, spans

MAX_ADDED_REPETITION = 0.2
"""How much more than the dense model the pruned one may repeat itself before it is suspected of
collapse.
"""

REMOVED_MARKS = "·○×+~"
"""One for each kind of block."""

_PERPLEXITY: Columns = [("perplexity", format_perplexity), ("change", format_change)]


def search(plan: Plan) -> Table:
    """List what the search measured: its steps, or the texts without the parts that go."""
    return _parts(plan, plan.parts) if plan.parts else _steps(plan)


def _steps(plan: Plan) -> Table:
    """List the perplexity of the dense model and after each step, also on held-out sequences, if
    any.
    """
    metric, dense, nested = plan.search.metric, plan.dense, plan.nested
    columns: Columns = [
        ("step", str), ("block", "{}".format) if nested else ("blocks", str), ("kind", str), (metric, "{:.4f}".format),
        *_PERPLEXITY, ("held out", format_perplexity), ("change", format_change),
    ]  # fmt: skip
    loss = dense.loss if metric == "nll" else None
    rows = [
        [
            "dense",
            None,
            None,
            loss,
            *_change(dense, dense),
            *_change(dense.held_out, dense.held_out),
        ]
    ]
    for number, (removals, step) in enumerate(
        zip(plan.size_keys, plan.steps, strict=True), start=1
    ):
        removed = [step.block, step.kind] if nested else [spans(removals), None]
        changes = [*_change(step, dense), *_change(step.held_out, dense.held_out)]
        rows.append([str(number), *removed, step.score, *changes])
    return tabulate("The steps of the search", columns, rows, [PERPLEXITY, _summarize(plan)])


def _change(record: Any, dense: Any) -> tuple[float | None, float | None]:
    if record is None:
        return None, None
    return record.perplexity, None if record is dense else record.perplexity / dense.perplexity - 1


def perplexities(plan: Plan) -> dict[str, list[float]]:
    """Return the perplexity of the dense model and at each size, by set of sequences."""
    records: tuple[Any, ...] = (plan.dense, *plan.steps) if plan.steps else ()
    held_out = [record.held_out.perplexity for record in records if record.held_out]
    series = {
        "searched on": [record.perplexity for record in records],
        "held out of the search": held_out,
    }
    return {name: values for name, values in series.items() if values}


def _summarize(plan: Plan) -> str:
    search, dtype, seconds = (
        plan.search,
        plan.model.computed_in(plan.search.dtype),
        plan.environment.seconds,
    )
    held_out = f" ({search.held_out} of them held out)" if search.held_out else ""
    calibrated = (
        f"calibrated on {plan.calibration}{held_out}, {dtype} on {search.device}, {seconds:.0f} s"
    )
    return f"{search.strategy} search by {search.metric}{', raced' if search.fast else ''}; {calibrated}"


def _parts(plan: Plan, found: ExpertPlan) -> Table:
    """List the perplexity of each text with and without the parts that go, and how much it uses
    them.
    """
    columns: Columns = [
        ("text", str), ("dense", format_perplexity), *_PERPLEXITY, ("energy kept", "{:.1%}".format),
        ("unused", "{:,}".format),
    ]  # fmt: skip
    rows = [
        [
            f"{public_source(text.text)}{', held out' if text.held_out else ''}",
            math.exp(text.dense),
            math.exp(text.pruned),
            math.expm1(text.pruned - text.dense),
            text.kept,
            text.unreached,
        ]
        for text in found.texts
    ]
    total = f"{found.count * len(found.blocks):,}"
    return tabulate(
        "The texts",
        columns,
        rows,
        [PERPLEXITY, _summarize(plan), f"unused: {plan.unit} that no token chose, of {total}"],
    )


def sizes(plan: Plan) -> str | None:
    """Say how many parameters and bytes the model has before and after, if the search counted."""
    if plan.parts is None:
        return None
    parameters = " to ".join(map(format_count, plan.parts.parameters))
    active = " to ".join(map(format_count, plan.parts.active_parameters))
    stored = " to ".join(map(format_bytes, plan.parts.weights_bytes))
    return f"parameters {parameters}, used by a token {active}; weights {stored}"


def recovery(record: RecoveryRecord) -> Table:
    """List the losses of a recovered model on held-out text."""
    rows = [
        [
            name,
            math.exp(losses.loss),
            losses.loss,
            losses.divergence,
            of_answers and of_answers.divergence,
        ]
        for name, losses, of_answers in record.models
    ]
    columns: Columns = [
        ("model", str), ("perplexity", format_perplexity), ("loss, nats", "{:.4f}".format),
        ("KL, nats", "{:.4f}".format), ("KL, answers", "{:.4f}".format),
    ]  # fmt: skip
    notes = [f"{record.summary}, measured on {record.test_text}, held out"]
    if (talks := record.conversations) and (answers := record.models[-1][2]):
        left = answers.left_of(talks.pruned)
        notes.append(f"on answers in its own conversations, {left:.0%} of the divergence is left")
    return tabulate("Recovery", columns, rows, notes)


def sample_rows(sample: SampleGeneration) -> list[tuple[str, str, str]]:
    """Return each model's name, how much it repeats itself, and its text."""
    return [
        ("dense", f"{sample.dense_repetition:.0%} repeated", sample.dense),
        ("pruned", f"{sample.pruned_repetition:.0%} repeated", sample.pruned),
    ]


def collapse_warnings(sample: SampleGeneration | None) -> list[str]:
    """Warn if the pruned model repeats itself much more than the dense one."""
    if sample is None or sample.pruned_repetition <= sample.dense_repetition + MAX_ADDED_REPETITION:
        return []
    return [
        f"The pruned model repeats itself: {sample.pruned_repetition:.0%} of its text, against "
        f"{sample.dense_repetition:.0%} of the dense model's. It may have collapsed, whatever its "
        f"perplexity."
    ]


def removed_kinds(plan: Plan) -> dict[int, str]:
    """Return the kind of each removed block, "" where it is unknown."""
    kinds = {step.block: step.kind for step in plan.steps} if plan.nested else {}
    return {block: kinds.get(block, "") for block in plan.removals}


def block_strip(blocks: int, removed: Mapping[int, str], width: int) -> list[str]:
    """Draw the blocks in order above a ruler: a bar for each remaining block, a mark for each
    removed one.
    """
    kinds: Iterable[str] = sorted(set(removed.values()))
    marks = {kind: REMOVED_MARKS[number % len(REMOVED_MARKS)] for number, kind in enumerate(kinds)}
    per_row = max(10, (width - 2) // 10 * 10)
    lines = []
    for start in range(0, blocks, per_row):
        row = range(start, min(start + per_row, blocks))
        lines.append(
            "  " + "".join(marks[removed[block]] if block in removed else "█" for block in row)
        )
        lines.append("  " + "".join(f"{block:<10}" for block in row[::10]).rstrip())
    legend = [f"{mark} {f'{kind} ' if kind else ''}removed" for kind, mark in marks.items()]
    return [*lines, "   ".join(["  █ kept", *legend])]
