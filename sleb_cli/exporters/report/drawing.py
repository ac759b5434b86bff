"""Pictures by matplotlib: one look, as SVG that follows the page's colours, or as SVG and PNG files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from sleb_plugins.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 840, 350
"""Widths in CSS pixels: of a page on a desk, and of one in a hand."""

# Of Okabe and Ito, whose colours people with any colour vision can tell apart. Each value stands for one role only, so
# that the page can put its own colour for light or dark in its place.
INK, MUTED, GRID, PAPER = "#1b1f25", "#5d6673", "#d8dce2", "#fefefe"
DENSE, PRUNED, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
ROLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    DENSE: "dense",
    PRUNED: "pruned",
    GREEN: "green",
    PURPLE: "purple",
    ORANGE: "orange",
}
SERIES = (PRUNED, DENSE, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "^", "D", "v")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sleb",
    "font.family": "DejaVu Sans",  # it comes with matplotlib, and is wider than what pages use: nothing is clipped
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11.0,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
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
    "grid.linewidth": 0.8,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.0,
    "hatch.linewidth": 1.0,
    "text.parse_math": False,  # a text or task may have a dollar in its name
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Canvas:
    """A figure to draw on; one point is one CSS pixel at 100 %."""

    figure: Figure
    width: int

    @property
    def narrow(self) -> bool:
        """Whether it is for a page in a hand."""
        return self.width < 500

    def height(self, pixels: float) -> None:
        """Set the height."""
        self.figure.set_size_inches(self.width / 72, pixels / 72)

    def panels(self, count: int, height: float) -> list[Axes]:
        """Return panels of this height, side by side on a wide page, else one below the other."""
        rows, columns = (count, 1) if self.narrow else (1, count)
        self.height(height * rows)
        axes = self.figure.subplots(rows, columns, squeeze=False)
        return [axis for row in axes for axis in row]


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: its file's name, and its id in a page.
        title: what it shows.
        description: what one would see, in words, with the numbers that matter.
        draw: draws it.
    """

    name: str
    title: str
    description: str
    draw: Callable[[Canvas], None]


def need_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        missing_extra("matplotlib", error)


def missing_extra(package: str, error: ImportError) -> NoReturn:
    """Say how to install what reports need."""
    raise MachineError(f"This needs {package}.", hint="Install it with: pip install 'sleb[report]'") from error


@contextmanager
def _drawn(plot: Plot, width: int) -> Iterator[Figure]:
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # The defaults first, so that no matplotlibrc of the user's changes the pictures.
    with style.context("default"), rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, 4), dpi=72, layout=ConstrainedLayoutEngine(w_pad=6 / 72, h_pad=6 / 72))
        plot.draw(Canvas(figure, width))
        yield figure


@dataclass(frozen=True)
class Inlined:
    """Pictures as elements of one page, in its colours and fonts; `rules` holds their styles, each only once."""

    rules: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def svg(self, plot: Plot, width: int, *, title_id: str) -> str:
        """Return a picture as an element, named by the element `title_id`."""
        with _drawn(plot, width) as figure:
            svg = _saved(figure, "svg", transparent=True).decode()
        height = float(figure.get_size_inches()[1]) * 72
        body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
        self.names.append(plot.name)
        body = _without_bare_groups(_own_ids(_small(body), f"p{len(self.names)}-"))
        for colour, role in ROLES.items():
            body = body.replace(colour, f"var(--{role})")
        body = re.sub(r' style="([^"]*)"', lambda match: f' class="{self._class_of(match[1])}"', body)
        return (
            f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-labelledby="{title_id}" '
            f'aria-describedby="{title_id}-desc">{body}</svg>'
        )

    def _class_of(self, declarations: str) -> str:
        return self.rules.setdefault(declarations, f"s{len(self.rules)}")

    @property
    def css(self) -> str:
        """The rules that the pictures need."""
        return "\n".join(f".{name} {{ {declarations} }}" for declarations, name in self.rules.items())


def svg_file(plot: Plot) -> bytes:
    """Return a picture as an SVG file on white, with its title and description inside."""
    from xml.sax.saxutils import escape

    with _drawn(plot, WIDE) as figure:
        svg = _saved(figure, "svg", facecolor=PAPER).decode()
    named = f"<title>{escape(plot.title)}</title>\n <desc>{escape(plot.description)}</desc>"
    opening = svg.index(">", svg.index("<svg")) + 1
    return (svg[:opening] + named + svg[opening:]).replace("'DejaVu Sans'", FONTS).encode()


def png_file(plot: Plot) -> bytes:
    """Return a picture as a PNG file on white, sharp on screens of double density."""
    with _drawn(plot, WIDE) as figure:
        return _saved(figure, "png", dpi=144, facecolor=PAPER)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata, **options)
    return file.getvalue()


def _small(svg: str) -> str:
    """Leave out what no browser needs: comments, metadata, empty turns, digits below a hundredth of a pixel."""
    svg = re.sub(r"<!--.*?-->|<(metadata|title|style)\b.*?</\1>|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=[ (\"\n,-])(\d+\.\d\d)\d+", r"\1", svg)
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "").replace("'DejaVu Sans'", "var(--font)")
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    return re.sub(r"\s*\n\s*", "\n", svg.replace("xlink:href", "href"))


def _own_ids(svg: str, prefix: str) -> str:
    """Keep only ids that something refers to, and make them short and this picture's own: a page holds many."""
    used = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)
    names = {name: f"{prefix}{number}" for number, name in enumerate(dict.fromkeys(a or b for a, b in used))}
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{names[match[1]]}"' if match[1] in names else "", svg)
    return re.sub(r"(url\(#|href=\"#)([^)\"]+)", lambda match: match[1] + names[match[2]], svg)


def _without_bare_groups(svg: str) -> str:
    """Leave out groups without attributes, which group nothing once their ids are gone."""
    kept: list[str] = []
    is_bare: list[bool] = []
    for piece in re.split(r"(<g\b[^>]*>\n?|</g>\n?)", svg):
        if piece.startswith("<g"):
            is_bare.append(piece.startswith("<g>"))
            bare = is_bare[-1]
        else:
            bare = piece.startswith("</g>") and is_bare.pop()
        if not bare:
            kept.append(piece)
    return "".join(kept)


def style_legend(axis: Axes, *, columns: int = 1, **options: Any) -> None:
    """Show a legend, if something has a label."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        axis.legend(handles, labels, ncols=columns, handlelength=2.2, borderaxespad=0.2, **options)


def whole_ticks(axis: Axes, values: Sequence[int], at_most: int) -> None:
    """Put ticks at some of these whole numbers of the x axis, evenly spread."""
    step = max(1, -(-len(values) // at_most))
    axis.set_xticks(list(values)[::step])


def set_logarithmic(axis: Axes) -> None:
    """Make the y axis of what is drawn logarithmic, with plain numbers: formulas like $10^{-1}$ are not typeset."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = logarithmic_ticks(math.log(low), math.log(high))
    axis.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.yaxis.minorticks_off()


def logarithmic_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Return round numbers between two natural logarithms, spread over the axis."""
    for steps in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        ticks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= math.log(tick) <= high]
        if len(ticks) <= at_most:
            break
    if len(ticks) > 1:
        return ticks[:: -(-len(ticks) // at_most)]
    return [float(f"{math.exp(low + (high - low) * part / 4):.4g}") for part in range(1, 4)]
