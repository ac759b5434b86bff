"""Pictures by matplotlib, in one look, as SVG and PNG on white paper."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleb_cli.exporters.findings import Estimate
from sleb_cli.tables.table import Table
from sleb_plugins.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 840
"""In points, one of which is a CSS pixel in a page."""

# Of Okabe and Ito, whose colours people with any colour vision can tell apart.
INK, MUTED, GRID = "#1b1f25", "#5d6673", "#d8dce2"
DENSE, PRUNED, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
SERIES = (PRUNED, DENSE, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "^", "D", "v")

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sleb",
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "grid.color": GRID,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # a text or task may have a dollar in its name
    "axes.formatter.useoffset": False,
}


_SIZES = "Each point is a size, named by the blocks removed; bars are 95% intervals."

CAPTIONS = {
    "quality-and-speed-generation": ("Generation: quality against measured speed", _SIZES),
    "quality-and-speed-prompt": ("Prompt processing: quality against measured speed", _SIZES),
    "perplexity": (
        "Change in perplexity by blocks removed",
        "Both models read the same tokens, so bars are 95% intervals of the paired difference.",
    ),
    "divergence": (
        "Divergence from the dense model",
        "How far predictions moved from the dense model's, at half, 90% and 99% of the positions.",
    ),
    "tasks": ("Tasks, dense and pruned", "Bars end in 95% intervals of each accuracy."),
    "differences": (
        "Paired differences on the same items",
        "Both models answer the same items: lost ones went from right to wrong, gained ones the other way.",
    ),
    "speedup": (
        "Measured speedup by blocks removed, and its bound",
        "Points are measured, with 95% intervals; dotted lines are what FLOPs and bytes would allow.",
    ),
    "latency": ("Latency of every run", "The share of runs that took at most this long. No run is left out."),
    "inter-token-latency": (
        "Latency between tokens",
        "The share of tokens that came at most this long after the one before.",
    ),
    "memory": ("Peak memory", "Measured in a process that runs nothing else."),
    "search": (
        "What each candidate would have cost",
        "Bright cells are cheap to remove, dark ones costly. A cross marks what a step removed, a dot what was "
        "removed before; hatched blocks are protected.",
    ),
    "loss": (
        "Loss by blocks removed",
        "If text was held out, the distance between the lines shows how far the search fits its own text.",
    ),
}
"""What each picture shows, and how to read it."""


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: its file's name, and its id in a page.
        height: in points.
        draw: draws it.
        numbers: what is drawn.
        workload: the only one that is drawn.
    """

    name: str
    height: float
    draw: Callable[[Figure], None]
    numbers: Table | None = None
    workload: str = ""

    @property
    def title(self) -> str:
        """What it shows."""
        return CAPTIONS[self.name][0] + (f", {self.workload}" if self.workload else "")

    @property
    def caption(self) -> str:
        """How to read it."""
        return CAPTIONS[self.name][1]


def need_extra() -> None:
    """Make sure that reports can be made.

    Raises:
        MachineError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise MachineError(f"This needs {name}.", hint="Install it with: pip install 'sleb[report]'") from error


def picture(plot: Plot, kind: str) -> bytes:
    """Return a picture as an SVG or PNG file; a PNG is sharp on screens of double density."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    # The defaults first, so that no matplotlibrc of the user's changes the pictures.
    with style.context("default"), rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # such as in a model's name
        figure = Figure(figsize=(WIDTH / 72, plot.height / 72), dpi=72, layout="constrained")
        plot.draw(figure)
        metadata: dict[str, Any] = {"Software": None}
        if kind == "svg":
            metadata = {"Title": plot.title, "Description": plot.caption, "Date": None, "Creator": None}
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=144 if kind == "png" else 72, metadata=metadata)
    return file.getvalue()


def scaled(values: Sequence[Estimate], scale: float) -> tuple[list[float], list[list[float]]]:
    """Return the values, and how far their intervals reach below and above."""
    reach = [(value - ends.low, ends.high - value) if ends else (0.0, 0.0) for value, ends in values]
    sides = [[scale * max(0.0, side) for side in both] for both in zip(*reach, strict=True)]
    return [scale * value for value, _ in values], sides


def draw_series(
    axis: Axes,
    number: int,
    name: str,
    places: Sequence[float],
    values: Sequence[Estimate],
    scale: float,
    **options: Any,
) -> None:
    """Draw one of several series as points with their intervals."""
    up, reach = scaled(values, scale)
    axis.errorbar(
        places, up, yerr=reach, label=name, color=SERIES[number], marker=MARKERS[number], capsize=2.5, elinewidth=1.2,
        **options,
    )  # fmt: skip


def whole_ticks(axis: Axes, values: Sequence[int]) -> None:
    """Put ticks at up to 20 of these whole numbers of the x axis, evenly spread."""
    axis.set_xticks(list(values)[:: max(1, -(-len(values) // 20))])


def plain_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis; by default, matplotlib would typeset powers of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5), numticks=8)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
