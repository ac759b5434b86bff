"""What a search found: its steps, the removed blocks, and a text by both models."""

import math
from collections.abc import Mapping
from typing import Any

from sleb_cli.names import public_source
from sleb_cli.plan import ExpertPlan, Plan, RecoveryRecord, SampleGeneration
from sleb_cli.records import OutputKind
from sleb_cli.tables.table import DENSE, PERPLEXITY, Column, Table, tabulate
from sleb_cli.units import format_bytes, format_change, format_count, format_perplexity, spans
from sleb_plugins.metrics.nll import NegativeLogLikelihood
from sleb_plugins.metrics.output import OutputDistance

MAX_ADDED_REPETITION = 0.2
"""How much more than the dense model the pruned one may repeat itself before it is suspected of
collapse.
"""

REMOVED_MARKS = "·○×+~"
"""One for each kind of block."""

DISTANCES = {
    "vectors": "distance: 1 - cosine of the vectors and those of the dense (original) model.",
    "classes": "distance: KL divergence of the classes from the dense (original) model's, in nats.",
    "scores": "distance: squared difference of the scores from the dense (original) model's.",
}
"""What a distance is, by what the model puts out."""

_MEAN = "Each sequence counts the same here, and each token in `sleb eval`."

_PERPLEXITY: list[Column] = [("perplexity", format_perplexity), ("change", format_change)]


def search(plan: Plan) -> Table:
    """List what the search measured: its steps, or the texts without the parts that go."""
    return _parts(plan, plan.parts) if plan.parts else _steps(plan)


def _steps(plan: Plan) -> Table:
    """List the perplexity of the dense model and after each step, also on held-out sequences, if
    any; of a model that only reads, the distance from the dense model's output.
    """
    metric = plan.search.metric
    block: Column = ("block", "{}".format) if plan.nested else ("blocks", str)
    columns: list[Column] = [
        ("step", str),
        block,
        ("kind", str),
        (metric, "{:.4f}".format),
        *_PERPLEXITY,
        ("held out", format_perplexity),
        ("change", format_change),
        ("distance", "{:.4f}".format),
        ("held-out distance", "{:.4f}".format),
    ]
    dense = plan.dense
    held_out = dense.held_out
    loss = dense.loss if metric == NegativeLogLikelihood.name else None
    row: list[Any] = ["dense", None, None, loss, dense.perplexity, None]
    row += [held_out and held_out.perplexity, None, dense.distance, None]
    rows = [row]
    for number, (removals, step) in enumerate(
        zip(plan.size_keys, plan.steps, strict=True), start=1
    ):
        removed = [step.block, step.kind] if plan.nested else [spans(removals), None]
        row = [str(number), *removed, step.score]
        if metric == OutputDistance.name:  # the distance, which has a column of its own
            row[-1] = None
        row += _with_change(step.perplexity, dense.perplexity)
        if step.held_out and held_out:
            row += _with_change(step.held_out.perplexity, held_out.perplexity)
        else:
            row += [None, None]
        row += [step.distance, step.held_out and step.held_out.distance]
        rows.append(row)
    words = DISTANCES.get(str(plan.model.output), f"{PERPLEXITY} {DENSE} {_MEAN}")
    return tabulate("The steps of the search", columns, rows, [words, _summarize(plan)])


def _with_change(perplexity: float | None, dense: float | None) -> list[float | None]:
    if perplexity is None or dense is None:
        return [None, None]
    return [perplexity, perplexity / dense - 1]


def perplexities(plan: Plan) -> dict[str, list[float]]:
    """Return the perplexity of the dense model and at each size, by set of sequences.

    Models that only read have none.
    """
    if not plan.steps or plan.dense.perplexity is None:
        return {}
    series = {"searched on": [plan.dense.perplexity]}
    for step in plan.steps:
        series["searched on"].append(step.perplexity or 0.0)
    if plan.dense.held_out:
        held_out = [plan.dense.held_out.perplexity or 0.0]
        for step in plan.steps:
            if step.held_out:
                held_out.append(step.held_out.perplexity or 0.0)
        series["held out of the search"] = held_out
    return series


def _summarize(plan: Plan) -> str:
    search = plan.search
    words = f"{search.strategy} search by {search.metric}"
    if search.fast:
        words += ", raced"
    text = str(plan.calibration)
    if plan.model.output:
        read = plan.calibration
        text = f"{read.title}: {read.sequences} texts of up to {read.sequence_length} tokens"
    words += f"; calibrated on {text}"
    if search.held_out:
        words += f" ({search.held_out} of them held out)"
    dtype = plan.model.computed_in(search.dtype)
    return f"{words}, {dtype} on {search.device}, {plan.environment.seconds:.0f} s"


def _parts(plan: Plan, experts: ExpertPlan) -> Table:
    """List each text's perplexity with and without the parts that go, and its use of them."""
    columns: list[Column] = [
        ("text", str),
        ("dense", format_perplexity),
        *_PERPLEXITY,
        ("energy kept", "{:.1%}".format),
        ("unused", "{:,}".format),
    ]
    rows = []
    for text in experts.texts:
        name = public_source(text.text)
        if text.held_out:
            name += ", held out"
        dense = math.exp(text.dense)
        pruned = math.exp(text.pruned)
        change = math.expm1(text.pruned - text.dense)
        rows.append([name, dense, pruned, change, text.kept, text.unreached])
    total = experts.count * len(experts.blocks)
    notes = [
        PERPLEXITY,
        f"energy kept: of the squares of what the {plan.unit} add, the share of those that stay. "
        f"unused: {plan.unit} that no token chose, of {total:,}.",
        _summarize(plan),
    ]
    return tabulate("The texts", columns, rows, notes)


def sizes(plan: Plan) -> str | None:
    """Say how many parameters and bytes the model has before and after, if the search counted."""
    if plan.parts is None:
        return None
    parameters = " to ".join(map(format_count, plan.parts.parameters))
    active = " to ".join(map(format_count, plan.parts.active_parameters))
    stored = " to ".join(map(format_bytes, plan.parts.weights_bytes))
    return f"parameters {parameters}, used by a token {active}; weights {stored}"


def recovery(record: RecoveryRecord, output: OutputKind | None) -> Table:
    """List the losses of a recovered model, or the distances of its output, on held-out text."""
    summaries = record.summaries(output)
    if output:
        distances = [[name, losses.divergence] for name, losses, _ in record.models]
        return tabulate(
            "Recovery", [("model", str), ("distance", "{:.4f}".format)], distances, summaries
        )
    columns: list[Column] = [
        ("model", str),
        ("perplexity", format_perplexity),
        ("loss, nats", "{:.4f}".format),
        ("KL, nats", "{:.4f}".format),
        ("KL, answers", "{:.4f}".format),
    ]
    rows = []
    for name, losses, answers in record.models:
        on_answers = answers.divergence if answers else None
        rows.append([name, math.exp(losses.loss), losses.loss, losses.divergence, on_answers])
    return tabulate("Recovery", columns, rows, summaries)


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
    kinds = dict.fromkeys(plan.removals, "")
    if plan.nested:
        for step in plan.steps:
            kinds[step.block] = step.kind
    return kinds


def block_strip(blocks: int, removed: Mapping[int, str], width: int) -> list[str]:
    """Draw the blocks above a ruler: a bar for each that stays, a mark for each removed one."""
    legend = "  █ kept"
    marks: dict[str, str] = {}
    for number, kind in enumerate(sorted(set(removed.values()))):
        mark = REMOVED_MARKS[number % len(REMOVED_MARKS)]
        marks[kind] = mark
        legend += f"   {mark} {kind} removed" if kind else f"   {mark} removed"
    lines = []
    per_row = max(10, (width - 2) // 10 * 10)
    for start in range(0, blocks, per_row):
        bars = "  "
        ruler = "  "
        for block in range(start, min(start + per_row, blocks)):
            bars += marks[removed[block]] if block in removed else "█"
            if block % 10 == 0:
                ruler += f"{block:<10}"
        lines += [bars, ruler.rstrip()]
    return [*lines, legend]
