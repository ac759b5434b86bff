"""Show the result of `sleb eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.tables.table import by_model
from sleb_cli.ui.names import short_name
from sleb_cli.ui.tables import print_line, print_title, print_written, show_table
from sleb_cli.units import plural, spans

if TYPE_CHECKING:
    from sleb_cli.results import EvalResult, PrunedTaskScores, TaskResult


def show_evaluation(result: EvalResult, output: Path | None) -> None:
    """Show the quality of the dense model and of each size, with what each differs by."""
    from sleb_cli.tables import quality  # pydantic, so here

    removals = result.sizes[-1] if result.sizes else ()
    print_title(short_name(result.model.id) + (f" without blocks {spans(removals)}" if removals else ""))
    names = quality.text_names(result.texts)
    scored = by_model(result.texts, names)
    tables = [quality.perplexities(scored), quality.divergences(scored)]
    tables += [
        quality.text_settings(result.texts, names),
        quality.tasks(by_model(result.tasks, map(quality.task_name, result.tasks))),
    ]
    for table in tables:
        show_table(table)
    for task in result.tasks:
        for size in task.pruned:
            _show_flips(task, size)
    print_line(f"{result.model.computed_in(result.dtype)} on {result.device}")
    print_written(output)


def _show_flips(task: TaskResult, size: PrunedTaskScores) -> None:
    removed = plural(len(size.removals), "block")
    for flip in size.flips:
        print_title(f"\n{task.task}, item {flip.doc_id}, which only one model gets right ({removed} removed)")
        print_line(f"  {' '.join(flip.prompt.split())[-300:]}")
        for name, text in (("right", flip.target), ("dense", flip.dense), ("pruned", flip.pruned)):
            print_line(f"  {name:6} {' '.join(text.split())[:160]}")
