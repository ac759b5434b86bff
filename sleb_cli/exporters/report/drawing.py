"""The look of every picture: SVG or PDF on white, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_cli.exporters.lines import Line
from sleb_cli.tables.quality import Estimate
from sleb_plugins.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 840
"""In points, one of which is a CSS pixel in a page."""
NARROW = 380
"""For phones."""

# The palette of Okabe and Ito, safe for any colour vision.
INK = "#1b1f25"
MUTED = "#5d6673"
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v")

_OFFSET = 0.06
"""Between the lines at one size, in removals, so that their intervals do not overlap."""

_MAX_TICKS = 20


@dataclass(frozen=True)
class Plot:
    """A picture to draw; `height` is in points, where its panels stand in one row."""

    title: str
    caption: str
    height: float
    draw: Callable[[Figure], None]
    panels: int = 1


def require_extra() -> None:
    """Check that the extra `report` is installed.

    Raises:
        MachineError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise MachineError(
            f"This needs {name}.", hint="Install it with: pip install 'sleb[report]'"
        ) from error


def is_narrow(figure: Figure) -> bool:
    """Whether a picture is drawn for a phone, with one panel above the other."""
    return bool(figure.get_figwidth() * 72 < WIDTH)


def render(plot: Plot, width: float = WIDTH, form: str = "svg") -> bytes:
    """Draw a picture as a file of this form: svg or pdf."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # The defaults come first, so that the user's matplotlibrc does not change the pictures.
    our_style = str(Path(__file__).with_name("pictures.mplstyle"))
    with style.context(["default", our_style]), warnings.catch_warnings():
        # A model's name may hold any character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        height = plot.height * (plot.panels if width < WIDTH else 1)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        plot.draw(figure)
        metadata = {"Title": plot.title, "Creator": None}
        if form == "svg":
            metadata |= {"Description": plot.caption, "Date": None}
        else:
            metadata |= {"Subject": plot.caption, "CreationDate": None}
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=72, metadata=metadata)
    return file.getvalue()


def draw_by_size(axis: Axes, lines: Sequence[Line]) -> None:
    """Draw lines over the number of removals, with a star for the dense model."""
    sizes = [0]
    dense = []
    # A line without values, as in a figure of several panels, takes no place.
    shift = -_OFFSET * (sum(bool(line.values) for line in lines) - 1) / 2
    for number, line in enumerate(lines):
        xs = [size + shift if size else 0.0 for size in line.values]
        draw_series(axis, number, xs, list(line.values.values()), label=line.name)
        sizes += line.values
        if line.values:
            shift += _OFFSET
        if 0 in line.values:
            dense.append(line.values[0][0])
    draw_dense(axis, [0.0] * len(dense), dense)
    set_whole_ticks(axis, max(sizes) + 1)
    axis.grid()


def draw_series(
    axis: Axes, number: int, xs: Sequence[float], values: Sequence[Estimate], **options: Any
) -> None:
    """Draw series `number` as points with error bars."""
    axis.errorbar(
        xs,
        [value for value, _ in values],
        yerr=error_bars(values),
        color=SERIES[number % len(SERIES)],
        # The next round of colours begins with another marker.
        marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
        capsize=2.5,
        elinewidth=1.2,
        **options,
    )


def draw_dense(axis: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Draw stars, which stand for the dense model."""
    axis.plot(xs, ys, "*", color=INK, markersize=11, label="dense", zorder=3)


def error_bars(values: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """Return the lengths of the error bars below and above."""
    below = []
    above = []
    for value, ends in values:
        if ends is None:
            below.append(0.0)
            above.append(0.0)
            continue
        # matplotlib refuses negative lengths, as of a value outside of its interval.
        below.append(max(0.0, value - ends.low))
        above.append(max(0.0, ends.high - value))
    return below, above


def set_whole_ticks(axis: Axes, count: int) -> None:
    """Put up to 20 x ticks at the whole numbers below `count`, evenly spread."""
    axis.set_xticks(range(0, count, math.ceil(count / _MAX_TICKS)))
