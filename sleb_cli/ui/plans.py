"""Show the result of `sleb search`."""

import math
from pathlib import Path

from rich.text import Text

from sleb_cli.names import short_name
from sleb_cli.plan import Plan, TargetRecord
from sleb_cli.requests import DEMO
from sleb_cli.tables import search_results as tables
from sleb_cli.ui.chart import Curve, draw_lines
from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.tables import print_line, print_title, print_to_copy, show_table
from sleb_cli.units import format_bytes, format_count, format_perplexity, in_shell, spans

# The plan has the full sample.
SAMPLE_CHARACTERS = 160
# With fewer, the table says it all.
CHART_STEPS = 3
CHART_WIDTH = 80
SMALL_MODELS = (
    "Small models lose most, and the demo has 135M parameters: Qwen2.5-Coder-1.5B keeps 98% of its "
    "right choices without 6 blocks."
)
"""What README says of the larger model, for those who start with the demo."""


def show_plan(plan: Plan, output: Path) -> None:
    """Show the result of a search and the path of its plan."""
    print_title(f"{short_name(plan.model.id)}: {plan.order.amount(len(plan.largest))} removed")
    show_table(tables.search(plan), title=False)
    if plan.steps:
        _show_blocks(plan)
    sizes = tables.sizes(plan)
    if sizes:
        print_line(sizes)
    _show_sample(plan)
    if plan.order.caveat:
        print_line(plan.order.caveat)
    _show_next(plan, output)


def _show_blocks(plan: Plan) -> None:
    """Show which blocks go, what the search did to find them, and its target."""
    search = plan.search
    console = stdout()
    if len(plan.steps) >= CHART_STEPS and plan.dense.perplexity is not None:
        console.print(perplexity_chart(plan, min(console.width, CHART_WIDTH)))
    lines = tables.block_strip(plan.model.blocks, tables.removed_kinds(plan), console.width)
    strip = Text("\n".join(lines))
    strip.highlight_regex("█+( kept)?", "green")
    strip.highlight_regex(f"[{tables.REMOVED_MARKS}]+( .*removed)?", "red")
    console.print(strip)
    for swap in plan.steps[-1].swaps:
        print_line(
            f"swapped: {spans(swap.restored)} restored, {spans(swap.removed)} removed; "
            f"{search.metric} {swap.before:.4f} -> {swap.after:.4f}"
        )
    if search.fast:
        print_line(race_summary(plan))
    if search.target is not None:
        print_line(target_summary(search.target, plan))
    if search.engine_reason:
        print_line(f"engine {search.engine}: {search.engine_reason}")


def _show_next(plan: Plan, output: Path) -> None:
    apply = f"sleb apply {in_shell(str(output))}"
    label = "next"
    if tables.collapse_warnings(plan.sample_generation):
        # The model may have collapsed: suggest half as many.
        half = len(plan.largest) // 2
        fewer = half - half % plan.order.multiple
        if fewer:
            label = "next, with fewer blocks removed"
            apply += f" --remove {fewer}"
    if plan.model.output is not None:  # vectors stay close to an old index only if healed
        apply += " --heal"
    if plan.model.id == DEMO:
        print_line(SMALL_MODELS)
        apply += " --recover"
    print_to_copy(f"wrote {output}; {label}: {apply}")


def _show_sample(plan: Plan) -> None:
    sample = plan.sample_generation
    if sample is None:
        return
    print_line(f'both models {sample.verb} "{sample.prompt}"')
    for name, repeated, text in tables.sample_rows(sample):
        line = " ".join(text.split())
        if len(line) > SAMPLE_CHARACTERS:
            line = f"{line[: SAMPLE_CHARACTERS - 2].rstrip()} …"
        print_line(f"  {name:6} ({repeated}): {line}")
    for warning in tables.collapse_warnings(sample):
        print_prose(stdout(), f"[yellow]{warning}[/]")


def perplexity_chart(plan: Plan, width: int) -> Text:
    """Draw the perplexity at each size on a log scale, searched and held out."""
    marks = [("●", "cyan"), ("○", "yellow")]
    lines = []
    points: list[float] = []
    for (mark, style), values in zip(marks, tables.perplexities(plan).values(), strict=False):
        logarithms = [math.log(value) for value in values]
        lines.append(Curve(mark, style, logarithms))
        points += logarithms
    legend = Text("perplexity by blocks removed")
    if plan.dense.held_out:
        legend.append("   ● searched on", "cyan")
        legend.append("   ○ held out", "yellow")
    low = min(points)
    high = max(points)
    labels = (_label(low), _label((low + high) / 2), _label(high))
    return Text("\n").join([legend, draw_lines(lines, labels, width)])


def _label(logarithm: float) -> str:
    return format_perplexity(math.exp(logarithm))


def race_summary(plan: Plan) -> str:
    """Say which share of the evaluations the races made, and which step had the closest lead."""
    sequences = plan.calibration.sequences - plan.search.held_out
    done = 0
    whole = 0
    closest = math.inf
    closest_step = 1
    for number, step in enumerate(plan.steps, start=1):
        if step.race is None:
            continue
        dropped = step.race.dropped.values()
        done += len(step.scores) * sequences + sum(drop.sequences for drop in dropped)
        whole += (len(step.scores) + len(dropped)) * sequences
        leads = [drop.behind for drop in dropped]
        if step.race.margin is not None:
            leads.append(step.race.margin)
        if leads and min(leads) < closest:
            closest = min(leads)
            closest_step = number
    if math.isinf(closest):
        return "raced: no step had two candidates to race"
    return (
        f"raced: {done / whole:.0%} of the evaluations; the closest lead was {closest:.4f}, in "
        f"step {closest_step}"
    )


def target_summary(target: TargetRecord, plan: Plan) -> str:
    """Say what the target was, how much of it was reached, and at what cost."""
    goal = plan.request.get(target.name)
    last = plan.steps[-1]
    if last.perplexity is None or plan.dense.perplexity is None:
        cost = f"the distance is {last.distance:.4f}"
    else:
        nats = math.log(last.perplexity / plan.dense.perplexity)
        cost = f"it cost {nats:.4f} nats per token"
    if target.name == "target_params":
        remain = f"{format_count(target.reached)} of {format_count(target.dense)} remain"
        return f"target: {goal} parameters; {remain}; {cost}"
    if target.name == "target_memory":
        before = format_bytes(target.dense)
        after = format_bytes(target.reached)
        return f"target: {goal}; weights and {target.kv_cache} take {after}, not {before}; {cost}"
    more = "no other block can be removed"
    if target.next is not None:
        more = f"one more removal: {target.next:.4f}"
    reached = f"{target.reached:.4f} with {plan.order.amount(len(plan.removals))} removed"
    return f"target: at most {target.limit:g}x the dense perplexity; {reached}; {more}"
