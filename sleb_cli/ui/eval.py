"""Show the result of `sleb eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sleb_cli.ui.console import stdout
from sleb_cli.ui.tables import new_table, print_line, print_title, print_written, setting, subject_title
from sleb_cli.units import format_count

if TYPE_CHECKING:
    from sleb_cli.results import EvalResult, Interval, PrunedTaskScores, TaskResult, TaskScores, TextResult


def show_evaluation(result: EvalResult, output: Path | None) -> None:
    """Show the quality of the dense model and of each size, with what each differs by."""
    console, blocks = stdout(), result.model.blocks
    print_title(console, subject_title(result, result.sizes[-1] if result.sizes else ()))
    for text in result.texts:
        _show_text(console, text, blocks)
    if result.tasks:
        _show_tasks(console, result.tasks, blocks)
    for task in result.tasks:
        for size in task.pruned:
            _show_flips(console, task, size)
    print_line(setting(result))
    print_written(output)


def _show_text(console: Console, text: TextResult, blocks: int) -> None:
    kinds = {"none": "no BOS", "text": "BOS before the first", "windows": "BOS before each"}
    stride = f", stride {text.stride}" if text.stride else ""
    console.print(
        f"\nperplexity on [bold]{escape(_short(text.text))}[/]: {text.windows} windows of {text.sequence_length} "
        f"tokens{stride}, {kinds[text.bos]}",
        soft_wrap=True,
    )
    compared = bool(text.pruned)
    table = new_table(
        "blocks", "perplexity", *(["ln ratio, 95 %"] if compared else []), "per word", "bits/byte", "ECE",
        optional=("per word", "ECE"),
    )  # fmt: skip
    changes = ["", *(_with_reach(size.log_ratio, size.interval) for size in text.pruned)]
    for scores, change in zip((text.dense, *text.pruned), changes, strict=True):
        cells = [_number(scores.word_perplexity), _number(scores.bits_per_byte, 3), f"{scores.calibration_error:.3f}"]
        changed = [change] if compared else []
        table.add_row(_blocks(blocks, scores), _number(scores.perplexity), *changed, *cells)
    console.print(table)
    if compared:
        console.print(_divergence(text, blocks))
    _print_legend(
        f"{format_count(text.tokens)} tokens; bits/byte and perplexity per word are of the same text; ECE: expected "
        "calibration error."
        + (
            f" ln ratio: of the perplexities, in nats per token; its error is by {text.clusters} {text.clustered_by}. "
            "KL: from the dense model, in nats per token."
            if compared
            else ""
        )
    )


def _divergence(text: TextResult, blocks: int) -> Table:
    """Return a table of the divergence from the dense model, with the figures of llama-perplexity."""
    table = new_table(
        "blocks", "KL", "median", "90 %", "99 %", "max", "RMS Δp", "same top", optional=("median", "90 %")
    )
    for size in text.pruned:
        apart = size.divergence
        figures = (apart.mean, apart.median, apart.p90, apart.p99, apart.maximum)
        table.add_row(
            _blocks(blocks, size), *(_number(figure, 3) for figure in figures),
            f"{apart.probability_change_rms:.1%}", f"{apart.same_top:.1%}",
        )  # fmt: skip
    return table


def _show_tasks(console: Console, tasks: tuple[TaskResult, ...], blocks: int) -> None:
    compared = any(task.pruned for task in tasks)
    table = new_table(
        "task", "blocks", "score, 95 %", *(["points, 95 %", "kept", "-/+", "p"] if compared else []),
        optional=("kept", "p", "-/+", "score, 95 %") if compared else (),
    )  # fmt: skip
    for task in tasks:
        table.add_section()
        shots = f", {task.num_fewshot}-shot" if task.num_fewshot else ""
        name = escape(f"{task.task}\n{task.metric}{shots}")
        table.add_row(name, str(blocks), _score(task.dense), *([""] * (4 * compared)))
        for size in task.pruned:
            flips = "" if size.lost is None else f"{size.lost}/{size.gained}"
            table.add_row(
                "", _blocks(blocks, size), _score(size), _points(size),
                "" if size.retention is None else f"{size.retention:.0%}", flips, _chance(size.mcnemar_p),
            )  # fmt: skip
    console.print(table)
    if compared:
        counts = {task.task: len(task.doc_ids) for task in tasks if task.doc_ids}
        items = ", ".join(f"{name} {count}" for name, count in counts.items())
        needed = [size.items_needed for task in tasks for size in task.pruned if size.items_needed]
        more = f" To see 1 point takes {format_count(max(needed))} items at most." if needed else ""
        _print_legend(
            "-/+: items that went from right to wrong, and from wrong to right; p: exact McNemar test. "
            f"Items: {items}.{more}"
        )


def _show_flips(console: Console, task: TaskResult, size: PrunedTaskScores) -> None:
    for flip in size.flips:
        console.print(
            f"\n[bold]{escape(task.task)}[/], item {flip.doc_id}, which only one model gets right "
            f"({len(size.removals)} blocks removed)",
            soft_wrap=True,
        )
        print_line(f"  {' '.join(flip.prompt.split())[-300:]}")
        for name, text in (("right", flip.target), ("dense", flip.dense), ("pruned", flip.pruned)):
            print_line(f"  {name:6} {' '.join(text.split())[:160]}")


def _score(scores: TaskScores) -> str:
    if scores.interval is None:
        return f"{scores.value:.3f}"
    return f"{scores.value:.3f} [{scores.interval.low:.3f}, {scores.interval.high:.3f}]"


def _points(size: PrunedTaskScores) -> str:
    if size.difference_interval is None:
        return f"{100 * size.difference:+.1f}"
    low, high = size.difference_interval.low, size.difference_interval.high
    return f"{100 * size.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _chance(p: float | None) -> str:
    if p is None:
        return ""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _with_reach(value: float, interval: Interval | None) -> str:
    return f"{value:+.3f}" if interval is None else f"{value:+.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _blocks(blocks: int, scores: object) -> str:
    """Return how many blocks stay."""
    return str(blocks - len(getattr(scores, "removals", ())))


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.2g}"


def _print_legend(text: str) -> None:
    """Print what a table's columns mean, wrapped to its width."""
    stdout().print(f"[dim]{escape(text)}[/]", width=80)


def _short(text: str) -> str:
    return Path(text).name if "/" in text and ":" not in text else text
