"""Show the result of `sleb eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.ui.console import stdout
from sleb_cli.ui.tables import (
    new_table,
    print_line,
    print_title,
    print_written,
    relative_change,
    setting,
    subject_title,
)

if TYPE_CHECKING:
    from sleb_cli.results import EvalResult, TaskRecord


def show_evaluation(result: EvalResult, output: Path | None) -> None:
    """Show the quality of the dense and the pruned model."""
    console, dense, pruned = stdout(), result.dense, result.pruned
    print_title(console, subject_title(result))
    table = new_table("", "dense", *(["pruned", "change"] if pruned else []))
    table.add_row("blocks", str(dense.blocks), *([str(pruned.blocks), ""] if pruned else []))
    for number, text in enumerate(dense.perplexities):
        after = pruned.perplexities[number].perplexity if pruned else None
        cells = [] if after is None else [f"{after:.2f}", relative_change(text.perplexity, after)]
        table.add_row(escape(f"perplexity, {_short(text.text)}"), f"{text.perplexity:.2f}", *cells)
    for number, task in enumerate(dense.tasks):
        other = pruned.tasks[number] if pruned else None
        cells = [] if other is None else [_with_error(other), f"{other.value - task.value:+.3f}"]
        table.add_row(escape(f"{task.task}, {task.metric}"), _with_error(task), *cells)
    console.print(table)
    print_line(setting(result))
    for text in dense.perplexities:
        bos = ", each after BOS" if text.bos else ""
        line = f"{text.text}: {text.windows} windows of {text.sequence_length} tokens{bos}"
        print_line(line)
    print_written(output)


def _short(text: str) -> str:
    return Path(text).name if "/" in text and ":" not in text else text


def _with_error(task: TaskRecord) -> str:
    return f"{task.value:.3f}" + (f" ± {task.stderr:.3f}" if task.stderr is not None else "")
