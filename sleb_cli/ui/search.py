"""Show the result of `sleb search`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sleb_cli.ui.chart import Line, draw_lines
from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.names import short_name
from sleb_cli.ui.tables import new_table, print_line, print_title, print_to_copy, relative_change, spans
from sleb_cli.units import format_bytes, format_count, format_perplexity

if TYPE_CHECKING:
    from sleb_cli.plan import Plan, SampleGeneration, TargetRecord
    from sleb_cli.results import CompareResult


# The plan has the full sample.
SAMPLE_CHARACTERS = 160
# With fewer, the table says it all.
CHART_STEPS = 3
CHART_WIDTH = 80
# One for each kind of block, and again from the first if there are more.
REMOVED_MARKS = "·○×+~"


def show_plan(plan: Plan, output: Path) -> None:
    """Show the steps of a search, the removed blocks, and the plan's path."""
    search = plan.search
    console = stdout()
    print_title(console, f"{short_name(plan.model.id)}: {search.remove} of {plan.model.blocks} blocks removed")
    console.print(_steps(plan))
    if len(plan.steps) >= CHART_STEPS:
        console.print(perplexity_chart(plan, min(console.width, CHART_WIDTH)))
    console.print(block_strip(plan.model.blocks, _removed_kinds(plan), console.width))
    for swap in plan.steps[-1].swaps:
        print_line(
            f"swapped: {spans(swap.restored)} restored, {spans(swap.removed)} removed; "
            f"{search.metric} {swap.before:.4f} -> {swap.after:.4f}"
        )
    held_out = f" ({search.held_out} of them held out)" if search.held_out else ""
    print_line(
        f"calibrated on {plan.calibration}{held_out}, {search.precision} on {search.device}, "
        f"{plan.environment.seconds:.0f} s"
    )
    if search.fast:
        print_line(race_summary(plan))
    if search.target is not None:
        print_line(target_summary(search.target, plan))
    if search.engine_reason:
        print_line(f"engine {search.engine}: {search.engine_reason}")
    if plan.sample_generation:
        _print_sample(console, plan.sample_generation)
    print_to_copy(f"wrote {output}; next: sleb apply {output}")


def _steps(plan: Plan) -> Table:
    """Return a table of the dense model and each step, also on the held-out sequences, if any."""
    metric, dense = plan.search.metric, plan.dense
    kinds = plan.nested and any(step.kind for step in plan.steps)
    first = ["step", "block" if plan.nested else "blocks", *(["kind"] if kinds else []), escape(metric)]
    # The loss says the same as the perplexity.
    optional = (*(["nll"] if metric == "nll" else []), "change", "kind")
    table = new_table(
        *first, "perplexity", "change", *(["held out", "change"] if dense.held_out else []), optional=optional
    )
    table.columns[1].no_wrap = plan.nested
    loss = f"{dense.loss:.4f}" if metric == "nll" else ""
    table.add_row(
        "dense", *([""] * (1 + kinds)), loss, f"{dense.perplexity:.2f}", "",
        *([f"{dense.held_out.perplexity:.2f}", ""] if dense.held_out else []),
    )  # fmt: skip
    for number, (removals, step) in enumerate(zip(plan.by_size, plan.steps, strict=True), start=1):
        blocks = str(step.block) if plan.nested else spans(removals)
        kind = [escape(step.kind)] if kinds else []
        cells = []
        if dense.held_out and (held_out := step.held_out):
            change = relative_change(dense.held_out.perplexity, held_out.perplexity)
            cells = [f"{held_out.perplexity:.2f}", f"[yellow]{change}[/]" if held_out.overfits else change]
        table.add_row(
            str(number), blocks, *kind, f"{step.score:.4f}",
            f"{step.perplexity:.2f}", relative_change(dense.perplexity, step.perplexity), *cells,
        )  # fmt: skip
    return table


def _print_sample(console: Console, sample: SampleGeneration) -> None:
    """Print the texts of both models, and a warning if the pruned one repeats itself."""
    print_line(f'both models continue "{sample.prompt}"')
    samples = {
        "dense": (sample.dense, sample.dense_repetition),
        "pruned": (sample.pruned, sample.pruned_repetition),
    }
    for name, (text, share) in samples.items():
        line = shorten(" ".join(text.split()), SAMPLE_CHARACTERS, placeholder=" …")
        print_line(f"  {name:6} ({share:.0%} repeated): {line}")
    if sample.is_repetitive:
        print_prose(
            console,
            f"[yellow]The pruned model repeats itself: {sample.pruned_repetition:.0%} of its text, against "
            f"{sample.dense_repetition:.0%} of the dense model's. It may have collapsed, whatever its perplexity.[/]",
        )


def perplexity_chart(plan: Plan, width: int) -> Text:
    """Draw the perplexity at each size, on a logarithmic scale, also on the held-out sequences, if any."""
    perplexities = [plan.dense.perplexity, *(step.perplexity for step in plan.steps)]
    lines = [Line("●", "cyan", [math.log(perplexity) for perplexity in perplexities])]
    legend = Text("perplexity by blocks removed")
    if plan.dense.held_out:
        held_out = [plan.dense.held_out, *(step.held_out for step in plan.steps)]
        lines.append(Line("○", "yellow", [math.log(record.perplexity) if record else None for record in held_out]))
        legend.append("   ● searched on", "cyan").append("   ○ held out", "yellow")
    known = [value for line in lines for value in line.values if value is not None]
    low, high = min(known), max(known)
    lowest, middle, highest = (format_perplexity(math.exp(value)) for value in (low, (low + high) / 2, high))
    return Text("\n").join([legend, draw_lines(lines, (lowest, middle, highest), width)])


def _removed_kinds(plan: Plan) -> dict[int, str]:
    """Return the removed blocks, each with its kind, or "" if it is not known."""
    kinds = {step.block: step.kind for step in plan.steps}
    return {block: kinds.get(block, "") if plan.nested else "" for block in plan.removals}


def block_strip(blocks: int, removed: Mapping[int, str], width: int) -> Text:
    """Draw the blocks in order above a ruler: a bar for each kept block, a mark by its kind for each removed one."""
    kinds = sorted(set(removed.values()))
    marks = {kind: REMOVED_MARKS[number % len(REMOVED_MARKS)] for number, kind in enumerate(kinds)}
    # Rows of whole tens, indented.
    per_row = max(10, (width - 2) // 10 * 10)
    rows = []
    for start in range(0, blocks, per_row):
        row = range(start, min(start + per_row, blocks))
        strip = Text("  ")
        for block in row:
            strip.append(*((marks[removed[block]], "red") if block in removed else ("█", "green")))
        ruler = "".join(str(block).ljust(10) for block in row if block % 10 == 0)
        rows += [strip, Text(f"  {ruler.rstrip()}", style="dim")]
    legend = Text("  █ kept", "green")
    for kind, mark in marks.items():
        legend.append(f"   {mark} {f'{kind} ' if kind else ''}removed", "red")
    return Text("\n").join([*rows, legend])


def race_summary(plan: Plan) -> str:
    """Return the share of evaluations made in races, and the step with the closest lead."""
    raced = [(number, step) for number, step in enumerate(plan.steps, start=1) if step.race is not None]
    sequences = plan.calibration.sequences - plan.search.held_out
    done = whole = 0
    leads: list[tuple[float, int]] = []
    for number, step in raced:
        dropped = step.race.dropped.values() if step.race else []
        done += len(step.scores) * sequences + sum(drop.sequences for drop in dropped)
        whole += (len(step.scores) + len(dropped)) * sequences
        others = (score for block, score in step.scores.items() if block != step.block)
        behind = [score - step.score for score in others if score is not None]
        leads.append((min([*behind, *(drop.behind for drop in dropped)], default=math.inf), number))
    lead, number = min(leads)
    return f"raced: {done / whole:.0%} of the evaluations; the closest lead was {lead:.4f}, in step {number}"


def show_comparison(result: CompareResult, output: Path) -> None:
    """Show the result of each search, and which was best."""
    console, removed = stdout(), len(result.compared[0].removals)
    print_title(console, f"{short_name(result.model.id)}: {removed} of {result.model.blocks} blocks removed")
    held_out = result.dense_held_out_perplexity is not None
    held_out_column = ["held out"] if held_out else []
    columns = ("metric", "strategy", "blocks", "perplexity", "change", *held_out_column, "seconds")
    table = new_table(*columns, optional=("seconds", "change"))
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[0].no_wrap, table.columns[2].no_wrap = True, False

    def cells(perplexity: float | None) -> list[str]:
        return [] if perplexity is None else [f"{perplexity:.2f}"]

    dense, dense_cells = result.dense_perplexity, cells(result.dense_held_out_perplexity)
    table.add_row("dense", "", "", f"{dense:.2f}", "", *dense_cells, "")
    for each in result.compared:
        best = f"{each.metric}@{each.strategy}" == result.best
        table.add_row(
            escape(each.metric), each.strategy, spans(each.removals), f"{each.perplexity:.2f}",
            relative_change(dense, each.perplexity), *cells(each.held_out_perplexity), f"{each.seconds:.0f}",
            style="bold green" if best else None,
        )  # fmt: skip
    console.print(table)
    print_line(f"calibrated on {result.calibration}, {result.dtype} on {result.device}")
    text = "the held-out sequences" if held_out else "the calibration text"
    print_to_copy(f"wrote {output}: the plan of {result.best}, best on {text}")


def target_summary(target: TargetRecord, plan: Plan) -> str:
    """Return the target, what was reached, and its cost."""
    cost = f"it cost {math.log(plan.steps[-1].perplexity / plan.dense.perplexity):.4f} nats per token"
    match target.name:
        case "target_params":
            remain = f"{format_count(target.reached)} of {format_count(target.dense)} remain"
            return f"target: {target.asked} parameters; {remain}; {cost}"
        case "target_memory":
            serving = target.serving
            cache = (
                f"a KV cache in {serving.dtype} for {serving.batch} x {serving.length} tokens"
                if serving
                else "a KV cache"
            )
            needs = f"weights and {cache} take {format_bytes(target.reached)}, not {format_bytes(target.dense)}"
            return f"target: {target.asked}; {needs}; {cost}"
        case "target_speedup":
            missed = "" if target.reached >= target.limit else ", below the target: remove more with --extend"
            measured = f"{target.reached:.2f}x measured ({target.predicted:.2f}x predicted){missed}"
            return f"target: {target.limit:g}x at {target.workload}; {measured}; {cost}"
    unit = "x the dense perplexity" if target.name == "max_perplexity_ratio" else " nats per token"
    more = f"one more removal: {target.next:.4f}" if target.next is not None else "no other block can be removed"
    reached = f"{target.reached:.4f} with {len(plan.removals)} of {plan.model.blocks} blocks removed"
    return f"target: at most {target.limit:g}{unit}; {reached}; {more}"
