"""Pictures of what a removal costs: on texts and on tasks, and beside what it gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.findings import (
    Data,
    Estimate,
    Findings,
    estimate,
    of_size,
    perplexity_change,
    workload_label,
)
from sleb_cli.exporters.headline import speedup
from sleb_cli.exporters.report.drawing import (
    DENSE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    PRUNED,
    PURPLE,
    SERIES,
    Canvas,
    Plot,
    set_logarithmic,
    style_legend,
    whole_ticks,
)
from sleb_cli.units import format_share, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TASKS = 24
_MOST_TEXTS = 4
_MOST_LABELS = 8
_TITLE = 32
"""Characters of a panel's title in a line, where three stand side by side."""

Line = tuple[str, list[tuple[int, Estimate]]]
"""A name, and a value for each number of removed blocks."""


def pareto_plots(findings: Findings) -> Iterator[Plot]:
    """Yield quality against measured speed, for each kind of workload."""
    kinds = _kinds_of_quality(findings)
    for result in findings.main_workloads:
        speeds = {size: speedup(entry) for size in findings.by_size if (entry := of_size(result, size))}
        shown = {kind: [_at(line, {len(size) for size in speeds}) for line in lines] for kind, lines in kinds.items()}
        shown = {kind: [line for line in lines if line[1]] for kind, lines in shown.items()}
        shown = {kind: lines for kind, lines in shown.items() if lines}
        if shown:
            yield _pareto(findings, result, {len(size): value for size, value in speeds.items()}, shown)


def _at(line: Line, counts: set[int]) -> Line:
    return line[0], [(count, value) for count, value in line[1] if count in counts]


def _kinds_of_quality(findings: Findings) -> dict[str, list[Line]]:
    """Return the kinds of quality that were measured, each with its lines over sizes."""
    kept = [(len(size), value) for size in findings.by_size if (value := findings.retention(size))]
    return {"perplexity": _perplexity_lines(findings), "accuracy": [("accuracy", kept)] if kept else []}


def _perplexity_lines(findings: Findings) -> list[Line]:
    return [
        (
            findings.text_name(text),
            [(len(size), perplexity_change(entry)) for size in findings.by_size if (entry := of_size(text, size))],
        )
        for text in findings.texts[:_MOST_TEXTS]
    ]


_NAMES = {"generation": "Generation", "prompt": "Prompt processing"}
_AXES = {"perplexity": "change of perplexity, %", "accuracy": "accuracy kept, %"}


def _pareto(findings: Findings, result: Data, speeds: dict[int, Estimate], kinds: dict[str, list[Line]]) -> Plot:
    name = result["workload"]["name"]
    points = [
        f"{plural(count, 'block')} removed: {speeds[count].value:.2f} times as fast, "
        + ", ".join(
            f"{line} {format_share(value.value, signed=kind == 'perplexity')}"
            for kind, lines in kinds.items()
            for line, values in lines
            for at, value in values
            if at == count
        )
        for count in speeds
    ]

    def draw(canvas: Canvas) -> None:
        for axis, (kind, lines) in zip(canvas.panels(len(kinds), 290), kinds.items(), strict=True):
            _draw_pareto(axis, kind, lines, speeds)
            axis.set_xlabel(f"speed-up, {workload_label(result['workload'])}")

    return Plot(
        f"quality-and-speed-{name}",
        f"{_NAMES[name]}: quality against measured speed",
        f"{'. '.join(points)}. Bars are 95 % intervals.",
        draw,
    )


def _draw_pareto(axis: Axes, kind: str, lines: list[Line], speeds: dict[int, Estimate]) -> None:
    start = 0.0 if kind == "perplexity" else 100.0
    for number, (name, values) in enumerate(lines):
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        across = [1.0, *(speeds[count].value for count, _ in values)]
        up = [start, *(100 * value.value for _, value in values)]
        axis.plot(across, up, "-", color=colour, linewidth=1.2, alpha=0.6)
        axis.errorbar(
            across[1:], up[1:], color=colour, marker=marker, linestyle="", capsize=2.5, elinewidth=1.2, label=name,
            xerr=_errors([speeds[count] for count, _ in values], 1), yerr=_errors([value for _, value in values], 100),
        )  # fmt: skip
        if number == 0:
            points = list(zip((count for count, _ in values), across[1:], up[1:], strict=True))
            for count, x, y in points[::-1][:: -(-len(points) // _MOST_LABELS)]:
                # On the outer side of the curve, where no line runs.
                place = (7, -13) if kind == "perplexity" else (7, 6)
                axis.annotate(f"−{count}", (x, y), place, textcoords="offset points", fontsize=10)
    axis.plot([1.0], [start], "*", color=INK, markersize=11, label="dense")
    axis.set_ylabel(_AXES[kind])
    axis.margins(0.1)
    if kind == "perplexity":
        _spread_large_changes(axis, lines)
    axis.grid()
    style_legend(axis, loc="upper left" if kind == "perplexity" else "lower left")


def _errors(values: Sequence[Estimate], scale: float) -> list[list[float]]:
    return [[scale * value.errors[side] for value in values] for side in (0, 1)]


def text_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the change of perplexity and the divergence by size."""
    lines = [line for line in _perplexity_lines(findings) if line[1]]
    if not lines:
        return
    if any(len(values) > 1 for _, values in lines):
        words = [
            f"{name}: "
            + ", ".join(f"{format_share(value.value, signed=True)} with {at} removed" for at, value in values)
            for name, values in lines
        ]
        yield Plot(
            "perplexity",
            "Change of perplexity over blocks removed",
            f"{'; '.join(words)}. Bars are 95 % intervals of the paired difference.",
            lambda canvas: _draw_lines(canvas, lines),
        )
    texts = [text for text in findings.texts if any(of_size(text, size) for size in findings.by_size)]
    yield Plot(
        "divergence",
        "Divergence from the dense model",
        _describe_divergence(findings, texts),
        _divergence(findings, texts),
    )


def _draw_lines(canvas: Canvas, lines: list[Line]) -> None:
    canvas.height(260)
    axis = canvas.figure.add_subplot()
    for number, (name, values) in enumerate(lines):
        counts, estimates = [0, *(at for at, _ in values)], [Estimate(0.0, 0.0, 0.0), *(value for _, value in values)]
        axis.errorbar(
            counts, [100 * value.value for value in estimates], yerr=_errors(estimates, 100), capsize=2.5,
            color=SERIES[number], marker=MARKERS[number], label=name, elinewidth=1.2,
        )  # fmt: skip
    axis.set(xlabel="blocks removed", ylabel=_AXES["perplexity"])
    whole_ticks(axis, range(0, max(at for _, values in lines for at, _ in values) + 1), 8 if canvas.narrow else 20)
    _spread_large_changes(axis, lines)
    axis.grid()
    style_legend(axis, loc="upper left")


def _spread_large_changes(axis: Axes, lines: list[Line]) -> None:
    """Use a logarithmic axis of the perplexity itself where some sizes are several times worse than others."""
    import numpy as np

    most = 100 * max(value.value for _, values in lines for _, value in values)
    if most < _LARGE_CHANGE:
        return
    axis.set_yscale(
        "function",
        functions=(
            lambda change: np.log(np.maximum(1 + np.asarray(change, float) / 100, 1e-6)),
            lambda log: 100 * np.expm1(np.asarray(log, float)),
        ),
    )
    axis.set_ylim(-12, 1.2 * most)
    ticks = [0, 20, 50, *(step * 10**decade for decade in range(2, 12) for step in (1, 2, 5))]
    shown = [tick for tick in ticks if tick <= most]
    axis.set_yticks(shown[:: -(-len(shown) // 10)])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


_LARGE_CHANGE = 300
_SHARES = (
    ("median", "median", "^", GREEN),
    ("mean", "mean", "o", PRUNED),
    ("p90", "90 %", "s", DENSE),
    ("p99", "99 %", "D", PURPLE),
)


def _divergence(findings: Findings, texts: list[Data]) -> Callable[[Canvas], None]:
    def draw(canvas: Canvas) -> None:
        shown = texts[: 4 if canvas.narrow else 3]
        for axis, text in zip(canvas.panels(len(shown), 260), shown, strict=True):
            entries = [entry for size in findings.by_size if (entry := of_size(text, size))]
            counts = [len(entry["removals"]) for entry in entries]
            for key, label, marker, colour in _SHARES:
                values = [max(entry["divergence"][key], 1e-6) for entry in entries]
                axis.plot(counts, values, marker=marker, color=colour, label=label, linewidth=1.2)
            axis.set(
                xlabel="blocks removed", ylabel="KL divergence, nats", title=fill(findings.text_name(text), _TITLE)
            )
            set_logarithmic(axis)
            axis.set_xticks(counts if len(counts) < 12 else counts[:: -(-len(counts) // 10)])
            axis.margins(x=0.15)
            axis.grid(axis="y")
        style_legend(canvas.figure.axes[0], columns=2, loc="best")

    return draw


def _describe_divergence(findings: Findings, texts: list[Data]) -> str:
    words = []
    for text in texts:
        if entry := of_size(text, findings.removals):
            kl = entry["divergence"]
            words.append(
                f"{findings.text_name(text)}: median {kl['median']:.3g}, mean {kl['mean']:.3g}, 90 % {kl['p90']:.3g}, "
                f"99 % {kl['p99']:.3g} nats; the same first choice at {format_share(kl['same_top'])} of the positions"
            )
    return f"With {plural(len(findings.removals), 'block')} removed, on {'; '.join(words)}." if words else ""


def task_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the tasks as bars with intervals, and their paired differences."""
    tasks = findings.main_tasks[:_MOST_TASKS]
    if not tasks:
        return
    entries = [entry for task in tasks if (entry := of_size(task, findings.removals))]
    words = [
        f"{task['task']}: {100 * task['dense']['value']:.1f} dense, {100 * entry['value']:.1f} pruned"
        for task, entry in zip(tasks, entries, strict=True)
    ]
    yield Plot(
        "tasks",
        "Tasks, dense and pruned",
        f"In percent, {'; '.join(words)}. Bars end in 95 % intervals.",
        lambda canvas: _draw_bars(canvas, tasks, entries),
    )
    words = [
        f"{task['task']}: {100 * entry['difference']:+.1f} points{_flips(entry)}"
        for task, entry in zip(tasks, entries, strict=True)
    ]
    yield Plot(
        "differences",
        "Paired differences on the same items",
        f"{'; '.join(words)}. Bars are 95 % intervals.",
        lambda canvas: _draw_differences(canvas, tasks, entries),
    )


def _flips(entry: Data) -> str:
    return "" if entry["lost"] is None else f", {entry['lost']} lost and {entry['gained']} gained"


def _draw_bars(canvas: Canvas, tasks: list[Data], entries: list[Data]) -> None:
    canvas.height(80 + 40 * len(tasks))
    axis = canvas.figure.add_subplot()
    for offset, label, colour, hatch, models in (
        (-0.19, "dense", DENSE, "", [task["dense"] for task in tasks]),
        (0.19, "pruned", PRUNED, "////", entries),
    ):
        values = [estimate(model["value"], model["interval"]) for model in models]
        axis.barh(
            [row + offset for row in range(len(tasks))], [100 * value.value for value in values], 0.36, color=colour,
            label=label, hatch=hatch, edgecolor=PAPER, linewidth=0, xerr=_errors(values, 100),
            error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5},
        )  # fmt: skip
    axis.set_yticks(range(len(tasks)), [_label(task) for task in tasks])
    axis.set(xlabel="%", xlim=(0, 100), ylim=(len(tasks) - 0.45, -0.55))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    canvas.figure.legend(loc="outside upper left", ncols=2)


def _label(task: Data) -> str:
    name = task["task"]
    return f"{name}\n{task['metric']}" if len(name) < 24 else f"{name[:23]}…\n{task['metric']}"


def _draw_differences(canvas: Canvas, tasks: list[Data], entries: list[Data]) -> None:
    canvas.height(60 + 36 * len(tasks))
    axis = canvas.figure.add_subplot()
    values = [estimate(entry["difference"], entry["difference_interval"]) for entry in entries]
    rows = range(len(tasks))
    axis.axvline(0, color=INK, linewidth=1)
    axis.errorbar(
        [100 * value.value for value in values], rows, xerr=_errors(values, 100), linestyle="", marker="o", capsize=3,
        color=PRUNED, elinewidth=1.6,
    )  # fmt: skip
    axis.set_yticks(rows, [_label(task) for task in tasks])
    axis.set(xlabel="pruned − dense, points", ylim=(len(tasks) - 0.45, -0.55))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    if any(entry["lost"] is not None for entry in entries):
        right = axis.secondary_yaxis("right")
        flips = [
            "" if entry["lost"] is None else f"{entry['lost']} lost\n{entry['gained']} gained" for entry in entries
        ]
        right.set_yticks(rows, flips, fontsize=9.5)
        right.tick_params(length=0, labelcolor=MUTED)
        right.spines["right"].set_visible(False)
