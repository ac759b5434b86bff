"""Pictures of the search: what each candidate would have cost, and how the loss grew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from sleb_cli.exporters.report.drawing import GREEN, MUTED, PRUNED, WIDTH, Plot, plain_ticks, whole_ticks
from sleb_cli.plan import Plan
from sleb_cli.tables.search import steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "cividis_r"  # readable with any colour vision, and in greys
_SHOWN = 0.8  # the share of candidates that the colours tell apart; the first blocks cost 10 to 10,000 times more


def search_plots(plan: Plan) -> Iterator[Plot]:
    """Yield the pictures of the search."""
    costs = candidate_costs(plan)
    row = max(7.0, min(24.0, 420 / len(costs)))
    if any(costs):
        yield Plot("search", 125 + row * len(costs), partial(_draw_heat_map, plan, costs, row))
    yield Plot("loss", 280, partial(_draw_loss_curve, plan), steps(plan))


def candidate_costs(plan: Plan) -> list[dict[int, float]]:
    """Return for each step by how much each candidate scored above the best one.

    Of a candidate that was dropped from a race, it is how far behind it was; of one whose score was not a finite
    number, it is infinite.
    """
    costs = []
    for step in plan.steps:
        scores = {block: math.inf if score is None else score for block, score in step.scores.items()}
        best = min(scores.values(), default=0.0)
        behind = {block: score - best for block, score in scores.items()}
        dropped = step.race.dropped if step.race else {}
        costs.append(behind | {block: max(0.0, drop.behind) for block, drop in dropped.items()})
    return costs


def _draw_heat_map(plan: Plan, costs: list[dict[int, float]], row: float, figure: Figure) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    axis, blocks = figure.add_subplot(), plan.model.blocks
    every = sorted(cost for step in costs for cost in step.values() if 0 < cost < math.inf)
    most = every[int(_SHOWN * (len(every) - 1))] if every else 1.0
    norm = PowerNorm(0.5, 0.0, most, clip=True)
    cells = np.zeros((len(costs), blocks, 4))
    for number, step in enumerate(costs):
        for block, cost in step.items():
            cells[number, block] = colormaps[_COLOURS](norm(cost))
    _mark_others(axis, plan, costs)
    extent = (-0.5, blocks - 0.5, len(costs) + 0.5, 0.5)
    axis.imshow(cells, aspect="auto", interpolation="none", extent=extent, zorder=2)
    size = max(3.0, min(9.0, row * 0.45, 0.5 * WIDTH / blocks))
    removed, rows = [step.block for step in plan.steps], range(1, len(costs) + 1)
    axis.plot(removed, rows, "x", color="#000000", markersize=size, markeredgewidth=size / 4, zorder=3)
    axis.set(xlim=extent[:2], ylim=extent[2:], xlabel="block", ylabel="step")
    whole_ticks(axis, range(blocks))
    apart = max(1, math.ceil(14 / row))
    axis.set_yticks(rows[::apart])
    right = axis.secondary_yaxis("right")
    right.set_yticks(rows[::apart], [str(block) for block in removed[::apart]])
    right.set_ylabel("removed block")
    for side in (axis, right):
        side.tick_params(length=0)
        for spine in side.spines.values():
            spine.set_visible(False)
    unit = "nats per token" if plan.search.metric == "nll" else plan.search.metric
    colours = ScalarMappable(norm, colormaps[_COLOURS].resampled(32))  # few, as each is a path of its own
    scale = figure.colorbar(colours, ax=axis, location="top", shrink=0.5, aspect=40, anchor=(0.0, 0.0), extend="max")
    scale.set_ticks([0, most / 16, most / 4, most], labels=["0", *(f"{most / part:.2g}" for part in (16, 4, 1))])
    scale.set_label(f"cost above the removed block's, {unit}", loc="left", fontsize=10)


def _mark_others(axis: Axes, plan: Plan, costs: list[dict[int, float]]) -> None:
    """Mark the blocks that were no candidates of a step: gone before, or protected."""
    from matplotlib.patches import Rectangle

    for number, (step, removals) in enumerate(zip(costs, plan.by_size, strict=True), start=1):
        # Where a swap changed earlier blocks, those of this size are gone.
        dots = [block for block in removals[:-1] if block not in step]
        axis.plot(dots, [number] * len(dots), ".", color=MUTED, markersize=2.5, zorder=1)
        for block in set(range(plan.model.blocks)) - set(step) - set(removals[:-1]):
            place = (block - 0.5, number - 0.5)
            axis.add_patch(Rectangle(place, 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))


def _draw_loss_curve(plan: Plan, figure: Figure) -> None:
    axis = figure.add_subplot()
    losses = [math.log(perplexity) for perplexity in (plan.dense.perplexity, *(step.perplexity for step in plan.steps))]
    sizes, dots = range(len(losses)), len(losses) <= 40
    axis.plot(sizes, losses, "-", marker="o" if dots else "", color=PRUNED, label="searched on")
    if plan.dense.held_out:
        held_out = [plan.dense.held_out.loss, *(step.held_out.loss for step in plan.steps if step.held_out)]
        axis.plot(sizes, held_out, "--", marker="s" if dots else "", color=GREEN, label="held out")
    axis.set(xlabel="blocks removed", ylabel="loss, nats per token", xlim=(-0.3, len(losses) - 0.7))
    axis.grid(axis="y")
    whole_ticks(axis, sizes)
    right = axis.secondary_yaxis("right")
    low, high = axis.get_ylim()
    ticks = plain_ticks(math.exp(low), math.exp(high))
    right.set_yticks([math.log(tick) for tick in ticks], [f"{tick:,g}" for tick in ticks])
    right.set_ylabel("perplexity")
    axis.legend(loc="best")
