"""What a report says, in order: sections of paragraphs, pictures, tables and gaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten
from typing import ClassVar

from sleb_cli.exporters import tables
from sleb_cli.exporters.findings import Data, Findings, of_size
from sleb_cli.exporters.report.drawing import Plot
from sleb_cli.exporters.report.quality_plots import pareto_plots, task_plots, text_plots
from sleb_cli.exporters.report.search_plots import search_plots
from sleb_cli.exporters.report.speed_plots import speed_plots
from sleb_cli.exporters.reproduce import commands, on_lines
from sleb_cli.exporters.tables import Table
from sleb_cli.units import format_share, plural

_MOST_FLIPS = 10
_FLIP_CHARACTERS = 600


@dataclass(frozen=True)
class Paragraph:
    """A sentence or more."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Picture:
    """A plot, and below it its numbers, folded."""

    kind: ClassVar[str] = "picture"
    plot: Plot
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Numbers:
    """A table; if `folded`, only its caption shows until it is opened."""

    kind: ClassVar[str] = "numbers"
    table: Table
    folded: bool = False


@dataclass(frozen=True)
class Gap:
    """What was not measured, and the command that does."""

    kind: ClassVar[str] = "gap"
    text: str
    command: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Saying:
    """A text by one model, and the share of it that repeats."""

    who: str
    text: str
    note: str


@dataclass(frozen=True)
class Sayings:
    """How models continue one prompt."""

    kind: ClassVar[str] = "sayings"
    prompt: str
    said: Sequence[Saying]


@dataclass(frozen=True)
class Flips:
    """Items of a task that only one model gets right."""

    kind: ClassVar[str] = "flips"
    title: str
    items: Sequence[Data]


Block = Paragraph | Picture | Numbers | Gap | Commands | Sayings | Flips


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading."""

    name: str
    title: str
    blocks: Sequence[Block]


def sections(findings: Findings) -> list[Section]:
    """Return the parts of a report, from what matters to most readers to what matters to few."""
    parts = [
        Section("trade", "Quality against speed", [*_trade(findings)]),
        Section("quality", "What it costs", [*_quality(findings)]),
        Section("speed", "What it gains", [*_speed(findings)]),
        Section("sayings", "What both models say", [*_sayings(findings)]),
        Section("search", "How the blocks were found", [*_search(findings)]),
        Section("recovery", "What recovery gave back", [*_recovery(findings)]),
        Section("settings", "Settings and how to repeat this", [*_settings(findings)]),
    ]
    return [part for part in parts if part.blocks]


def plots_of(parts: Iterable[Section]) -> list[Plot]:
    """Return every picture of a report."""
    return [block.plot for part in parts for block in part.blocks if isinstance(block, Picture)]


def _trade(findings: Findings) -> Iterator[Block]:
    plots = list(pareto_plots(findings))
    for plot in plots:
        yield Picture(plot, "Each point is a size, named by the blocks removed; bars are 95 % intervals.")
    if not plots:
        measured = findings.texts or findings.main_tasks
        name = findings.plan_argument
        if not measured:
            yield Gap("Quality was not measured yet", f"sleb eval {name} --every 2 --tasks piqa,arc_easy")
        if not findings.main_workloads:
            yield Gap("Speed was not measured yet", f"sleb bench {name} --every 2")


def _quality(findings: Findings) -> Iterator[Block]:
    name = findings.plan_argument
    if findings.texts:
        yield from _pictures(
            text_plots(findings), {"perplexity": tables.texts(findings), "divergence": tables.divergence(findings)}
        )
        if len(findings.sizes_of(findings.texts)) < 2:
            yield Numbers(tables.texts(findings))
        yield Numbers(tables.how_texts(findings), folded=True)
    else:
        yield Gap(
            "Perplexity and divergence on text were not measured yet",
            f"sleb eval {name} --every 2 --perplexity wikitext2,c4",
        )
    if findings.main_tasks:
        yield from _pictures(task_plots(findings), {"differences": tables.tasks(findings)})
        if by_size := tables.task_sizes(findings):
            yield Numbers(by_size)
        yield from _flips(findings)
    else:
        yield Gap("Accuracy on tasks was not measured yet", f"sleb eval {name} --every 2 --tasks piqa,arc_easy")


_CAPTIONS = {
    "search": "Bright cells are cheap to remove, dark ones costly; crosses mark what each step removed.",
    "loss": "Where text was held out, the distance between the lines shows how far the search fits its own text.",
    "perplexity": "Both models read the same tokens, so bars are 95 % intervals of the paired difference.",
    "divergence": "How far predictions moved from the dense model's, at half, 90 % and 99 % of the positions.",
    "tasks": "Bars end in 95 % intervals of each accuracy.",
    "differences": "Both models answer the same items: lost ones went from right to wrong, gained ones the other way.",
    "speedup": "Points are measured, with 95 % intervals; dotted lines are what FLOPs and bytes would allow.",
    "latency": "The share of runs that took at most this long. No run is left out.",
    "inter-token-latency": "The share of tokens that came at most this long after the one before.",
    "memory": "Of a process that runs nothing else.",
}


def _pictures(plots: Iterable[Plot], numbers: dict[str, Table]) -> Iterator[Block]:
    for plot in plots:
        yield Picture(plot, _CAPTIONS[plot.name], numbers.get(plot.name))


def _flips(findings: Findings) -> Iterator[Block]:
    for task in findings.main_tasks:
        entry = of_size(task, findings.removals)
        if entry and entry["flips"]:
            shown = [
                {
                    key: shorten(value, _FLIP_CHARACTERS, placeholder=" …") if isinstance(value, str) else value
                    for key, value in flip.items()
                }
                for flip in entry["flips"][:_MOST_FLIPS]
            ]
            yield Flips(f"{task['task']}: {plural(len(shown), 'item')} that only one model gets right", shown)


def _speed(findings: Findings) -> Iterator[Block]:
    if not findings.main_workloads:
        yield Gap("Speed and memory were not measured yet", f"sleb bench {findings.plan_argument} --every 2")
        return
    numbers = {"speedup": tables.speeds(findings), "latency": tables.latencies(findings)}
    if memory := tables.memory(findings):
        numbers["memory"] = memory
    yield Paragraph("Workloads are named batch x prompt tokens + new tokens; each run has prompts of its own.")
    plots = list(speed_plots(findings))
    yield from _pictures(plots, numbers)
    if memory and not any(plot.name == "memory" for plot in plots):
        yield Numbers(memory)
    if found := tables.sizes(findings):
        yield Numbers(found, folded=len(found.rows) > 8)


def _sayings(findings: Findings) -> Iterator[Block]:
    sample = findings.plan["sample_generation"]
    if sample is None:
        command = on_lines(f"{commands(findings)[0]} --sample-tokens 48 --force")
        yield Gap("The search let neither model write anything at this size", command)
        return
    yield Sayings(
        sample["prompt"],
        [
            Saying(who, sample[who].strip(), f"{sample[f'{who}_repetition']:.0%} repeated")
            for who in ("dense", "pruned")
        ],
    )
    yield Paragraph(
        'Both continue the prompt greedily. "Repeated" is the share of runs of 4 tokens that occurred before.'
    )


def _search(findings: Findings) -> Iterator[Block]:
    plots = list(search_plots(findings))
    yield from _pictures(plots, {plots[-1].name: tables.steps(findings)})
    if findings.plan["dense"]["held_out"] is None:
        yield Gap(
            "No text was held out of the search, so nothing shows how far it fits its own",
            on_lines(f"{commands(findings)[0]} --holdout 0.2 --force"),
        )
    if by_kind := tables.kinds(findings):
        yield Numbers(by_kind)
    if findings.blocks >= 6:
        yield Paragraph(_by_depth(findings))


def _by_depth(findings: Findings) -> str:
    """Return how many blocks are gone of each third of the model."""
    edges = [round(part * findings.blocks / 3) for part in range(4)]
    thirds = zip(("first", "middle", "last"), pairwise(edges), strict=True)
    gone = [
        f"{sum(low <= block < high for block in findings.removals)} of {high - low} in the {name} third"
        for name, (low, high) in thirds
        if high > low
    ]
    return f"By depth, these are gone: {', '.join(gone)}."


def _recovery(findings: Findings) -> Iterator[Block]:
    table = tables.recovery(findings)
    if not table:
        return
    record = findings.plan["recovery"]
    dense, pruned = record["dense"], record["pruned"]
    recovered = (record["heal"] or {}).get("losses") or record["closed_form_losses"] or pruned
    lost = pruned["loss"] - dense["loss"]
    text = "The removal cost nothing there"
    if lost > 0:
        back = min(1.0, (pruned["loss"] - recovered["loss"]) / lost)
        text = f"{format_share(back)} of the loss that the removal cost is back"
    left = recovered["divergence"] / pruned["divergence"] if pruned["divergence"] else 0.0
    yield Paragraph(f"{text}; {format_share(left)} of the divergence from the dense model is left.")
    yield Numbers(table)


def _settings(findings: Findings) -> Iterator[Block]:
    yield Commands([on_lines(command) for command in commands(findings)])
    for table in tables.settings(findings):
        yield Numbers(table)
