"""Draw docs/images/when-it-pays.svg from docs/figures.toml.

    python tests/benchmarks/draw_when_it_pays.py [FILE]

`when_it_pays.py` draws what it measures with `draw`.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_cli.exporters.report.drawing import INK, MUTED, SERIES, Plot, error_bars, render_svg
from sleb_cli.results import Interval
from sleb_cli.tables.quality import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
DENSE = "28 blocks"
ROWS = {
    DENSE: "all blocks",
    "26 blocks, chosen on code": "blocks chosen on code",
    "24 blocks, chosen on code": "blocks chosen on code",
    "22 blocks, chosen on code": "blocks chosen on code",
    "26 blocks, chosen on its own programs": "chosen on its own programs",
    "24 blocks, chosen on its own programs": "chosen on its own programs",
    "24 blocks, chosen on its own programs, healed in 47 min": "the same, healed",
    "Q3_K_M, 28 blocks": "fewer bits",
    "Q2_K, 28 blocks": "fewer bits",
}
"""Rows of docs/figures.toml, with their recipes. Healing is left out at 26 blocks, where it gained
nothing for sure.
"""

HEIGHT, SIZE = 460, 12
"""In points."""
SHAPES = {"8": 18, "o": 18, "s": 17, "D": 16, "^": 10}
"""A marker for each recipe, with its size, so that all hold a number."""
STEP = 0.025
"""Between models of as many blocks, which would hide each other's intervals; a share of the axis.
"""
PAPER, GRID = "#ffffff", "#d8dce2"
# The paper is drawn too: a site may be light where the system of its reader is dark.
DARK = {
    PAPER: "#161b22",
    INK: "#e6edf3",
    MUTED: "#9da7b3",
    GRID: "#30363d",
    SERIES[0]: "#ff9d4d",
    SERIES[1]: "#58b4ff",
}


@dataclass(frozen=True)
class Mark:
    """A model: its number of blocks or its name, its recipe, and what it keeps by use, of which the
    dense one has none.

    Speed is relative to the dense model's.
    """

    label: str
    recipe: str
    gigabytes: float
    speed: float
    kept: dict[str, Estimate] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = [f"{use} {value:.0%}" for use, (value, _) in self.kept.items()]
        return ", ".join(
            [self.label, self.recipe, f"{self.gigabytes:.2f} GB", f"{self.speed:.2f}x", *shares]
        )


def read_marks(figures: dict[str, Any]) -> list[Mark]:
    """Read ROWS from the measures of a model, by name."""
    sizes, speeds, choices, programs = (
        figures[name]["values"] for name in ("gigabytes", "prompt", "choices", "programs")
    )
    marks = []
    for row, recipe in ROWS.items():
        first = row.partition(", ")[0]
        # Size and speed depend neither on which blocks go nor on healing.
        timed = row if row in speeds else f"{first}, chosen on code"
        kept = {}
        if row in choices and row != DENSE:
            kept["choosing an answer"] = share(*choices[row])
        if row in programs and row != DENSE:
            solved, low, high = programs[row]
            kept["writing programs"] = share(100 * solved / programs[DENSE], low, high)
        speed = 1.0 if row == DENSE else speeds[timed]
        marks.append(Mark(first.removesuffix(" blocks"), recipe, sizes[timed], speed, kept))
    return marks


def share(percent: float, low: float, high: float) -> Estimate:
    return percent / 100, Interval(low=low / 100, high=high / 100)


def draw(marks: Sequence[Mark]) -> str:
    """Draw what is kept against bytes and against speed, as SVG for light and dark pages."""
    caption = "\n".join(
        [
            "The share of the dense model's score that is kept, by size and by speed.",
            *map(str, marks),
        ]
    )
    svg = render_svg(
        Plot("When pruning pays", caption, HEIGHT, partial(_draw_panels, marks))
    ).decode()
    rules = [
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}\n'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    ]
    dark = (
        f'<style type="text/css">@media (prefers-color-scheme: dark) {{\n{"".join(rules)}}}</style>'
    )
    return svg.replace("</defs>", f"{dark}</defs>", 1)


def _draw_panels(marks: Sequence[Mark], figure: Figure) -> None:
    uses = dict(
        zip(dict.fromkeys(use for mark in marks for use in mark.kept), SERIES, strict=False)
    )
    recipes = dict(zip(dict.fromkeys(mark.recipe for mark in marks), SHAPES, strict=False))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, places in (
        (left, [mark.gigabytes for mark in marks]),
        (right, [mark.speed for mark in marks]),
    ):
        for mark, place in zip(marks, places, strict=True):
            alike = [other.recipe for other in marks if other.label == mark.label]
            aside = (
                STEP
                * (max(places) - min(places))
                * (alike.index(mark.recipe) - (len(alike) - 1) / 2)
            )
            _draw_mark(axis, mark, place + aside, recipes[mark.recipe], uses)
        axis.margins(x=0.08)
        axis.tick_params(labelsize=SIZE)
        axis.grid()
    left.set_xlabel("size of the weights, GB", fontsize=SIZE)
    right.set_xlabel("speed of prompts, times the dense model's", fontsize=SIZE)
    left.set_ylabel("score kept, % of the dense model's", fontsize=SIZE)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    drawn = {
        use: left.plot([], "o", color=colour, markersize=10)[0] for use, colour in uses.items()
    }
    for number, (recipe, shape) in enumerate(recipes.items()):
        (drawn[recipe],) = left.plot([], shape, color=MUTED if number else INK, markersize=10)
    title = "Numbers are blocks kept; lines are 95% intervals."
    options = {
        "ncols": 4,
        "title": title,
        "alignment": "left",
        "fontsize": SIZE,
        "title_fontsize": SIZE,
    }
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", **options)


def _draw_mark(axis: Axes, mark: Mark, place: float, shape: str, uses: dict[str, str]) -> None:
    """Draw a model once for each use; a number of blocks stands in its marker, and a name below its
    interval.
    """
    for use, estimate in (mark.kept or {"": (1.0, None)}).items():
        value, _ = estimate
        reach = error_bars([estimate])
        colour = uses.get(use, INK)
        axis.errorbar([place], [value], reach, fmt="none", color=colour, elinewidth=1.5, alpha=0.5)
        axis.plot([place], [value], shape, color=colour, markersize=SHAPES[shape])
        if mark.label.isdigit():
            text = {"xytext": (0, 0), "va": "center_baseline", "color": PAPER}
        else:
            text = {"xytext": (0, -4 if reach[0][0] else -9), "va": "top", "color": colour}
            value -= reach[0][0]
        axis.annotate(
            mark.label,
            (place, value),
            ha="center",
            textcoords="offset points",
            fontsize=SIZE,
            **text,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=DOCS / "images/when-it-pays.svg")
    file = parser.parse_args().file
    figures = tomllib.loads((DOCS / "figures.toml").read_text(encoding="utf-8"))
    file.write_text(draw(read_marks(figures["coder"])), encoding="utf-8")


if __name__ == "__main__":
    main()
