"""What a search found: its steps, the blocks that go, and what both models say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sleb_cli.plan import HeldOutRecord, Plan, RecoveryRecord, SampleGeneration
from sleb_cli.results import CompareResult
from sleb_cli.tables.table import Table
from sleb_cli.units import format_change, format_perplexity, spans

REMOVED_MARKS = "·○×+~"
"""One for each kind of block, and again from the first if there are more."""


def steps(plan: Plan) -> Table:
    """Return the dense model and each step, also on the held-out sequences, if any."""
    metric, dense = plan.search.metric, plan.dense
    columns = ["step", "block" if plan.nested else "blocks", "kind", metric]
    columns += ["perplexity", "change", "held out", "change"]
    loss = f"{dense.loss:.4f}" if metric == "nll" else ""
    rows = [["dense", "", "", loss, *_perplexities(dense.perplexity, None), *_held_out(dense.held_out, None)]]
    for number, (removals, step) in enumerate(zip(plan.by_size, plan.steps, strict=True), start=1):
        blocks, kind = (str(step.block), step.kind) if plan.nested else (spans(removals), "")
        perplexities = _perplexities(step.perplexity, dense.perplexity)
        held_out = _held_out(step.held_out, dense.held_out)
        rows.append([str(number), blocks, kind, f"{step.score:.4f}", *perplexities, *held_out])
    # The loss says the same as the perplexity.
    optional = [*(["nll"] if metric == "nll" else []), "change", "kind"]
    words = {"kind"} if plan.nested else {"blocks", "kind"}
    return Table("The steps of the search", columns, rows, [_how(plan)], words, optional).filled()


def _how(plan: Plan) -> str:
    search, text, seconds = plan.search, plan.calibration, plan.environment.seconds
    held_out = f" ({search.held_out} of them held out)" if search.held_out else ""
    calibrated = f"calibrated on {text}{held_out}, {search.precision} on {search.device}, {seconds:.0f} s"
    return f"{search.strategy} search by {search.metric}{', raced' if search.fast else ''}; {calibrated}"


def _perplexities(value: float, dense: float | None) -> tuple[str, str]:
    return format_perplexity(value), format_change(value / dense - 1) if dense else ""


def _held_out(record: HeldOutRecord | None, dense: HeldOutRecord | None) -> tuple[str, str]:
    return _perplexities(record.perplexity, dense.perplexity if dense else None) if record else ("", "")


def kinds(plan: Plan) -> Table:
    """Return how many of the removed blocks are of each kind, if the model has several."""
    removed = sorted(step.kind for step in plan.steps if step.kind)
    rows = [[kind, str(removed.count(kind))] for kind in dict.fromkeys(removed)]
    return Table("Removed blocks by kind", ["kind", "removed"], rows)


def comparison(result: CompareResult) -> Table:
    """Return the searches of a comparison."""
    dense, held_out = result.dense_perplexity, result.dense_held_out_perplexity
    columns = ["metric", "strategy", "blocks", "perplexity", "change", "held out", "seconds"]
    rows = [["dense", "", "", format_perplexity(dense), "", format_perplexity(held_out) if held_out else "", ""]]
    for each in result.compared:
        on_held_out = format_perplexity(each.held_out_perplexity) if each.held_out_perplexity else ""
        change = format_change(each.perplexity / dense - 1)
        numbers = [format_perplexity(each.perplexity), change, on_held_out, f"{each.seconds:.0f}"]
        rows.append([each.metric, each.strategy, spans(each.removals), *numbers])
    return Table("The searches", columns, rows, words={"strategy", "blocks"}, optional=["seconds", "change"]).filled()


def recovery(record: RecoveryRecord) -> Table:
    """Return the losses of a recovered model on held-out text."""
    stages = {"dense": record.dense, "pruned": record.pruned, "recovered in closed form": record.closed_form_losses}
    if record.heal:
        stages[f"healed on {record.heal.tokens:,} tokens"] = record.heal.losses
    rows = [
        [name, format_perplexity(math.exp(losses.loss)), f"{losses.loss:.4f}", f"{losses.divergence:.4f}"]
        for name, losses in stages.items()
        if losses
    ]
    text = record.report_text
    notes = [f"{record.summary}, measured on {text}, held out"]
    return Table("Recovery", ["model", "perplexity", "loss, nats", "KL from dense, nats"], rows, notes)


def said(sample: SampleGeneration) -> list[tuple[str, str, str]]:
    """Return for each model its name, how much it repeats itself, and its text."""
    return [
        ("dense", f"{sample.dense_repetition:.0%} repeated", sample.dense),
        ("pruned", f"{sample.pruned_repetition:.0%} repeated", sample.pruned),
    ]


def collapse(sample: SampleGeneration | None) -> list[str]:
    """Return a warning if the pruned model repeats itself much more than the dense one."""
    if sample is None or not sample.is_repetitive:
        return []
    return [
        f"The pruned model repeats itself: {sample.pruned_repetition:.0%} of its text, against "
        f"{sample.dense_repetition:.0%} of the dense model's. It may have collapsed, whatever its perplexity."
    ]


def removed_kinds(plan: Plan) -> dict[int, str]:
    """Return the removed blocks, each with its kind, or "" if it is not known."""
    kinds = {step.block: step.kind for step in plan.steps} if plan.nested else {}
    return {block: kinds.get(block, "") for block in plan.removals}


def block_strip(blocks: int, removed: Mapping[int, str], width: int) -> list[str]:
    """Draw the blocks in order above a ruler: a bar for each kept block, a mark by its kind for each removed one."""
    kinds: Iterable[str] = sorted(set(removed.values()))
    marks = {kind: REMOVED_MARKS[number % len(REMOVED_MARKS)] for number, kind in enumerate(kinds)}
    per_row = max(10, (width - 2) // 10 * 10)
    lines = []
    for start in range(0, blocks, per_row):
        row = range(start, min(start + per_row, blocks))
        lines.append("  " + "".join(marks[removed[block]] if block in removed else "█" for block in row))
        lines.append("  " + "".join(f"{block:<10}" for block in row[::10]).rstrip())
    legend = [f"{mark} {f'{kind} ' if kind else ''}removed" for kind, mark in marks.items()]
    return [*lines, "   ".join(["  █ kept", *legend])]
