"""Pictures of the search: what each candidate would have cost, and how the loss grew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sleb_cli.exporters.findings import Data, Findings
from sleb_cli.exporters.report.drawing import (
    GREEN,
    INK,
    MUTED,
    PRUNED,
    Canvas,
    Plot,
    logarithmic_ticks,
    style_legend,
    whole_ticks,
)
from sleb_cli.units import format_perplexity, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

_COLOURS = "cividis_r"  # readable with any colour vision, and in greys
_SHOWN = 0.8  # the share of candidates that the colours tell apart; the first blocks cost 10 to 10,000 times more


def search_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the pictures of the search."""
    costs = candidate_costs(findings)
    if any(costs):
        yield _heat_map(findings, costs)
    yield _loss_curve(findings)


def candidate_costs(findings: Findings) -> list[dict[int, float]]:
    """Return for each step by how much each candidate scored above the best one.

    Of a candidate that was dropped from a race, it is how far behind it was; of one whose score was not a finite
    number, it is infinite.
    """
    costs = []
    for step in findings.plan["steps"]:
        scores = {int(b): math.inf if score is None else float(score) for b, score in step["scores"].items()}
        best = min(scores.values(), default=0.0)
        behind = {block: score - best for block, score in scores.items()}
        dropped = step["race"]["dropped"] if step["race"] else {}
        costs.append(behind | {int(block): max(0.0, float(drop["behind"])) for block, drop in dropped.items()})
    return costs


def _heat_map(findings: Findings, costs: list[dict[int, float]]) -> Plot:
    order = ", ".join(str(step["block"]) for step in findings.plan["steps"])
    raced = any(step["race"] for step in findings.plan["steps"])
    metric = findings.plan["search"]["metric"]
    return Plot(
        name="search",
        title="What each candidate would have cost",
        description=(
            f"A heat map of {plural(len(costs), 'step')} by {findings.blocks} blocks. The colour of a cell says how "
            f"far the {metric} without that block lay above the best of its step"
            + (", estimated where the candidate was dropped from the race. " if raced else ". ")
            + f"A cross marks the removed block of each step, in order: {order}. Hatched cells were no candidates."
        ),
        draw=lambda canvas: _draw_heat_map(canvas, findings, costs),
    )


def _draw_heat_map(canvas: Canvas, findings: Findings, costs: list[dict[int, float]]) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    steps, blocks = len(costs), findings.blocks
    row = max(7.0, min(24.0, 420 / steps))
    canvas.height((190 if canvas.narrow else 145) + row * steps)
    axis = canvas.figure.add_subplot()
    every = sorted(cost for step in costs for cost in step.values() if 0 < cost < math.inf)
    most = every[int(_SHOWN * (len(every) - 1))] if every else 1.0
    norm = PowerNorm(0.5, 0.0, most, clip=True)
    cells = np.zeros((steps, blocks, 4))
    for number, step in enumerate(costs):
        for block, cost in step.items():
            cells[number, block] = colormaps[_COLOURS](norm(cost))
    _mark_others(axis, findings, costs)
    axis.imshow(cells, aspect="auto", interpolation="none", extent=(-0.5, blocks - 0.5, steps + 0.5, 0.5), zorder=2)
    size = max(3.0, min(9.0, row * 0.45, 0.5 * canvas.width / blocks))
    removed = [step["block"] for step in findings.plan["steps"]]
    axis.plot(removed, range(1, steps + 1), "x", color="#000000", markersize=size, markeredgewidth=size / 4, zorder=3)
    axis.set(xlim=(-0.5, blocks - 0.5), ylim=(steps + 0.5, 0.5), xlabel="block", ylabel="step")
    whole_ticks(axis, range(0, blocks), 8 if canvas.narrow else 20)
    apart = max(1, math.ceil(14 / row))
    axis.set_yticks(range(1, steps + 1)[::apart])
    axis.tick_params(length=0)
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(1, steps + 1)[::apart], [str(block) for block in removed[::apart]])
    right.set_ylabel("removed block")
    right.tick_params(length=0)
    for spine in (*axis.spines.values(), *right.spines.values()):
        spine.set_visible(False)
    metric = findings.plan["search"]["metric"]
    _explain(canvas, axis, norm, "nats per token" if metric == "nll" else metric)


def _mark_others(axis: Axes, findings: Findings, costs: list[dict[int, float]]) -> None:
    """Mark the blocks that were no candidates of a step: gone before, or protected."""
    from matplotlib.patches import Rectangle

    gone: set[int] = set()
    for number, (step, removals) in enumerate(zip(costs, findings.by_size, strict=True), start=1):
        # Where a swap changed earlier blocks, those of this size are gone.
        gone = set(removals[:-1]) or gone
        dots = [block for block in sorted(gone) if block not in step]
        axis.plot(dots, [number] * len(dots), ".", color=MUTED, markersize=2.5, zorder=1)
        protected = [block for block in range(findings.blocks) if block not in step and block not in gone]
        for block in protected:
            axis.add_patch(
                Rectangle((block - 0.5, number - 0.5), 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0)
            )


def _explain(canvas: Canvas, axis: Axes, norm: Normalize, unit: str) -> None:
    """Draw the scale of the colours above the map, and what the marks mean below it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = ScalarMappable(norm, colormaps[_COLOURS].resampled(32))  # few, as each is a path of its own
    width = 0.9 if canvas.narrow else 0.5
    pixels = width * canvas.width / 10
    scale = canvas.figure.colorbar(
        colours, ax=axis, location="top", shrink=width, aspect=pixels, anchor=(0.0, 0.0), extend="max", pad=0.02
    )
    most = float(norm.vmax or 1.0)
    scale.set_ticks([0, most / 16, most / 4, most], labels=["0", *(f"{most / part:.2g}" for part in (16, 4, 1))])
    scale.set_label(f"cost above the removed block's, {unit}", loc="left", fontsize=10)
    scale.outline.set_visible(False)
    marks: list[Any] = [
        Line2D([], [], linestyle="", marker="x", color=INK, markeredgewidth=2, label="removed in this step"),
        Line2D([], [], linestyle="", marker=".", color=MUTED, label="removed before"),
        Patch(fill=False, hatch="////", edgecolor=MUTED, linewidth=0, label="no candidate"),
    ]
    canvas.figure.legend(
        handles=marks, loc="outside lower left", ncols=1 if canvas.narrow else 3, handlelength=1.6, columnspacing=1.6
    )


def _loss_curve(findings: Findings) -> Plot:
    plan = findings.plan
    dense, steps = plan["dense"], plan["steps"]
    words = (
        f"On the calibration text, perplexity goes from {format_perplexity(dense['perplexity'])} to "
        f"{format_perplexity(steps[-1]['perplexity'])} with {plural(len(steps), 'block')} removed"
    )
    if dense["held_out"]:
        words += (
            f"; on text held out of the search, from {format_perplexity(dense['held_out']['perplexity'])} to "
            f"{format_perplexity(steps[-1]['held_out']['perplexity'])}"
        )
    return Plot("loss", "Loss over blocks removed", f"{words}.", lambda canvas: _draw_loss_curve(canvas, findings))


def _draw_loss_curve(canvas: Canvas, findings: Findings) -> None:
    canvas.height(250 if canvas.narrow else 280)
    axis = canvas.figure.add_subplot()
    plan = findings.plan
    entries: list[Data] = [plan["dense"], *plan["steps"]]
    sizes = range(len(entries))
    dots = len(entries) <= 40
    axis.plot(
        sizes, [math.log(entry["perplexity"]) for entry in entries], "-", marker="o" if dots else "", color=PRUNED,
        label="searched on",
    )  # fmt: skip
    if plan["dense"]["held_out"]:
        held_out = [entry["held_out"]["loss"] for entry in entries]
        axis.plot(sizes, held_out, "--", marker="s" if dots else "", color=GREEN, label="held out")
    axis.set(xlabel="blocks removed", ylabel="loss, nats per token", xlim=(-0.3, len(entries) - 0.7))
    axis.grid(axis="y")
    whole_ticks(axis, sizes, 8 if canvas.narrow else 20)
    right = axis.secondary_yaxis("right")
    ticks = logarithmic_ticks(*axis.get_ylim())
    right.set_yticks([math.log(tick) for tick in ticks], [f"{tick:,g}" for tick in ticks])
    right.set_ylabel("perplexity")
    style_legend(axis, loc="upper left")
