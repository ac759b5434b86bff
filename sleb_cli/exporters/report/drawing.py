"""How does every picture look? Drawn by matplotlib, as SVG on white."""

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

# The palette of Okabe and Ito, safe for any colour vision.
INK, MUTED = "#1b1f25", "#5d6673"
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Plot:
    """A picture to draw; `height` is in points."""

    title: str
    caption: str
    height: float
    draw: Callable[[Figure], None]


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


def render_svg(plot: Plot) -> bytes:
    """Draw a picture as an SVG file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # The defaults come first, so that the user's matplotlibrc does not change the pictures.
    our_style = str(Path(__file__).with_name("pictures.mplstyle"))
    with style.context(["default", our_style]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # such as in a model's name
        figure = Figure(figsize=(WIDTH / 72, plot.height / 72), dpi=72, layout="constrained")
        plot.draw(figure)
        metadata = {"Title": plot.title, "Description": plot.caption, "Date": None, "Creator": None}
        file = io.BytesIO()
        figure.savefig(file, format="svg", dpi=72, metadata=metadata)
    return file.getvalue()


def scale_estimates(
    values: Sequence[Estimate], scale: float
) -> tuple[list[float], list[list[float]]]:
    """Return the scaled values, and the lengths of their error bars below and above."""
    bars = [(value - ends.low, ends.high - value) if ends else (0.0, 0.0) for value, ends in values]
    # matplotlib refuses negative lengths, as of a value outside of its interval.
    sides = [[scale * max(0.0, length) for length in side] for side in zip(*bars, strict=True)]
    return [scale * value for value, _ in values], sides


def draw_series(
    axis: Axes,
    number: int,
    xs: Sequence[float],
    values: Sequence[Estimate],
    scale: float,
    **options: Any,
) -> None:
    """Draw series `number` as points with error bars."""
    ys, bars = scale_estimates(values, scale)
    colour, marker = number % len(SERIES), (number + number // len(SERIES)) % len(MARKERS)
    options |= {
        "color": SERIES[colour],
        "marker": MARKERS[marker],
        "capsize": 2.5,
        "elinewidth": 1.2,
    }
    axis.errorbar(xs, ys, yerr=bars, **options)


def set_whole_ticks(axis: Axes, values: Sequence[int]) -> None:
    """Put x ticks at up to 20 of these whole numbers, evenly spread."""
    axis.set_xticks(list(values)[:: max(1, -(-len(values) // 20))])
