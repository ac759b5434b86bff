"""Results as tables on stdout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sleb_cli.plan import Plan
from sleb_cli.ui.console import stdout


def new_table(title: str, *columns: str) -> Table:
    """Give a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def show_plan(plan: Plan, output: Path) -> None:
    """Show the steps of a search, which blocks are gone, and where the plan is."""
    calibration, how = plan.calibration, plan.search
    console = stdout()
    table = new_table(
        f"{plan.model.id}: {how.remove} of {plan.model.blocks} blocks removed",
        "step", "block", how.metric, "perplexity", "change",
    )  # fmt: skip
    table.add_row("dense", "", "" if how.metric != "nll" else f"{plan.dense.loss:.4f}", f"{plan.dense.perplexity:.2f}", "")
    for number, step in enumerate(plan.steps, start=1):
        table.add_row(
            str(number), str(step.block), f"{step.score:.4f}",
            f"{step.perplexity:.2f}", relative_change(plan.dense.perplexity, step.perplexity),
        )  # fmt: skip
    console.print(table)
    console.print(block_strip(plan.model.blocks, plan.removals))
    console.print(
        f"calibrated on {calibration.source}: {calibration.sequences} x {calibration.sequence_length} tokens, "
        f"{how.dtype} on {how.device}, {plan.environment.seconds:.0f} s",
        soft_wrap=True,
    )
    if how.engine_reason:
        console.print(f"engine {how.engine}: {how.engine_reason}", soft_wrap=True)
    console.print(f"wrote {output}; next: sleb apply {output}", soft_wrap=True, markup=False)


def block_strip(blocks: int, removed: Collection[int]) -> Text:
    """Draw every block in order: full where it stays, hollow where it is gone, with a ruler below."""
    strip, ruler = Text("  "), "  "
    for block in range(blocks):
        gone = block in removed
        strip.append("·" if gone else "█", style="red" if gone else "green")
        if block % 10 == 0:
            ruler += str(block).ljust(10)
    return Text("\n").join([strip, Text(ruler.rstrip(), style="dim")])


def relative_change(before: float, after: float) -> str:
    """Say a relative change as people read it."""
    return f"{after / before - 1:+.1%}" if before else ""
