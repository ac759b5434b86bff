"""Pictures by matplotlib, in one look, as SVG on white paper."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_cli.tables.quality import Estimate
from sleb_plugins.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 840
"""In points, one of which is a CSS pixel in a page."""

# Of Okabe and Ito, whose colours people with any colour vision can tell apart.
INK, MUTED = "#1b1f25", "#5d6673"
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Plot:
    """A picture: what it shows, how to read it, its height in points, and what draws it."""

    title: str
    caption: str
    height: float
    draw: Callable[[Figure], None]


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


def picture(plot: Plot) -> bytes:
    """Return a picture as an SVG file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # The defaults first, so that no matplotlibrc of the user's changes the pictures.
    own = str(Path(__file__).with_name("pictures.mplstyle"))
    with style.context(["default", own]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # such as in a model's name
        figure = Figure(figsize=(WIDTH / 72, plot.height / 72), dpi=72, layout="constrained")
        plot.draw(figure)
        metadata = {"Title": plot.title, "Description": plot.caption, "Date": None, "Creator": None}
        file = io.BytesIO()
        figure.savefig(file, format="svg", dpi=72, metadata=metadata)
    return file.getvalue()


def scaled(values: Sequence[Estimate], scale: float) -> tuple[list[float], list[list[float]]]:
    """Return the values, and how far their intervals reach below and above."""
    reach = [(value - ends.low, ends.high - value) if ends else (0.0, 0.0) for value, ends in values]
    sides = [[scale * max(0.0, side) for side in both] for both in zip(*reach, strict=True)]
    return [scale * value for value, _ in values], sides


def draw_series(
    axis: Axes, number: int, places: Sequence[float], values: Sequence[Estimate], scale: float, **options: Any
) -> None:
    """Draw one of several series as points with their intervals."""
    up, reach = scaled(values, scale)
    colour, marker = number % len(SERIES), (number + number // len(SERIES)) % len(MARKERS)
    options |= {"color": SERIES[colour], "marker": MARKERS[marker], "capsize": 2.5, "elinewidth": 1.2}
    axis.errorbar(places, up, yerr=reach, **options)


def whole_ticks(axis: Axes, values: Sequence[int]) -> None:
    """Put ticks at up to 20 of these whole numbers of the x axis, evenly spread."""
    axis.set_xticks(list(values)[:: max(1, -(-len(values) // 20))])
