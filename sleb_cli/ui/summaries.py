"""Show the results of the commands, other than searches and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.names import short_name
from sleb_cli.tables.table import by_model
from sleb_cli.ui.console import escape_controls, print_prose, stdout
from sleb_cli.ui.tables import print_line, print_title, print_to_copy, print_written, show_table
from sleb_cli.units import format_bytes, in_shell

if TYPE_CHECKING:
    from sleb_cli.results import (
        ApplyResult,
        BenchResult,
        EvalResult,
        ExportResult,
        GgufResult,
        PrunedTaskScores,
        TaskResult,
    )

# Tables import the records, and so pydantic, which `sleb --help` must not wait for: functions
# import them.


def show_evaluation(result: EvalResult, output: Path | None) -> None:
    """Show the quality of the dense model and of each size."""
    from sleb_cli.tables import quality

    removals = result.sizes[-1] if result.sizes else ()
    title = short_name(result.model.id)
    if removals:
        title += f" {result.order.describe(removals)}"
    print_title(title)
    names = quality.text_names(result.texts)
    scored = by_model(result.texts, names)
    tables = [
        quality.perplexities(scored),
        quality.divergences(scored),
        quality.text_settings(result.texts, names),
        quality.tasks(by_model(result.tasks, map(quality.task_name, result.tasks))),
        quality.verdicts(result.tasks),
    ]
    for table in tables:
        show_table(table)
    for task in result.tasks:
        for size in task.pruned:
            _show_flips(task, size, result.order.describe(size.removals))
    print_line(f"{result.model.computed_in(result.dtype)} on {result.device}")
    print_written(output)


def _show_flips(task: TaskResult, size: PrunedTaskScores, removed: str) -> None:
    for flip in size.flips:
        print_title(
            f"\n{task.task}, item {flip.doc_id}, which only one model gets right ({removed})"
        )
        print_line(f"  {' '.join(flip.prompt.split())[-300:]}")
        for name, text in (("right", flip.target), ("dense", flip.dense), ("pruned", flip.pruned)):
            print_line(f"  {name:6} {' '.join(text.split())[:160]}")


def show_benchmark(result: BenchResult, output: Path | None) -> None:
    """Show the size, speed and memory of each model."""
    from sleb_cli.tables import provenance, speed

    print_title(short_name(result.model.id))
    for size in result.pruned:
        print_line(f"-{len(size.removals)}: {result.order.describe(size.removals)}")
    timed = by_model(result.workloads, map(speed.workload_name, result.workloads))
    tables = [speed.sizes(result), speed.speeds(timed, result.order), speed.latencies(timed)]
    for table in (*tables, speed.memory(timed), provenance.result_settings(result)):
        show_table(table)
    print_written(output)


def show_applied(result: ApplyResult | GgufResult) -> None:
    """Show what was written and how far it is proven."""
    from sleb_cli.tables.checks import check_clauses, match_clause
    from sleb_cli.tables.search_results import recovery

    proof, clauses = result.proof, check_clauses(result.proof) if result.proof else []
    if result.kind == "apply":
        path, size, is_verified = result.folder, result.weights_bytes, proof is not None
        unproven = None
    else:
        path, size, is_verified = result.file, result.file_bytes, result.verified
        copied = "row" if result.cuts else "tensor"
        clauses.insert(0, f"every {copied} is a byte-for-byte copy from the source")
        unproven = result.unproven
    print_to_copy(f"wrote {path}: {result.blocks} blocks, {format_bytes(size)}")
    for cut in result.cuts:
        print_line(f"{cut.title.lower()}: {cut.change}")
    if result.kind == "apply" and result.recovery:
        show_table(recovery(result.recovery), title=False)
    where = f" in {proof.dtype} on {proof.device}" if proof else ""
    if not is_verified:
        print_line("not verified (--no-verify)")
    elif missing := proof.partial if proof else f"logits not compared: {unproven}":
        print_prose(
            stdout(),
            f"[yellow]partially proven[/]{where}: {escape('; '.join([*clauses, missing]))}",
        )
    elif proof:
        print_prose(stdout(), f"[green]proven[/]{where}: {match_clause(proof.reference)}")
    if result.kind == "gguf":
        file = in_shell(result.file)
        print_to_copy(f"to run it: llama-cli -m {file}, or lms import {file} (LM Studio)")
        return
    folder = in_shell(result.folder)
    if result.removals and not result.recovery:
        print_line(
            "--recover would win back a fifth to three fifths of what was lost, in minutes to an "
            "hour"
        )
    print_to_copy(f"to run it: transformers serve {folder}, or vllm serve {folder}")
    print_to_copy(f"to publish it: hf upload ORG/NAME {folder} --private")


def show_exported(result: ExportResult) -> None:
    """Print an exported text, or the file it was written to."""
    if result.file is not None:
        print_written(Path(result.file))
    else:
        print(escape_controls(result.text or ""), end="")
