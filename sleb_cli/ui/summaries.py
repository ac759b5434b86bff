"""Show the results of the commands, other than searches and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.names import short_name
from sleb_cli.ui.console import escape_controls, print_prose, stdout
from sleb_cli.ui.tables import print_line, print_title, print_to_copy, print_written, show_table
from sleb_cli.units import format_bytes, in_shell

if TYPE_CHECKING:
    from sleb_cli.records import Proof
    from sleb_cli.results import (
        ApplyResult,
        BenchResult,
        ComparedRecord,
        EvalResult,
        ExportResult,
        GgufResult,
        PrunedTaskScores,
        TaskResult,
    )

_NOT_VERIFIED = "not verified (--no-verify)"

# Tables import the records, and so pydantic, which `sleb --help` must not wait for: functions
# import them.


def show_evaluation(result: EvalResult, output: Path | None) -> None:
    """Show the quality of the dense model and of each size."""
    from sleb_cli.tables import quality

    if result.compared:
        _show_comparison(result, result.compared)
    else:
        title = short_name(result.model.id)
        if result.sizes:
            title += f" {result.order.describe(result.sizes[-1])}"
        print_title(title)
        for table in quality.evaluation_tables(result, quality.text_names(result.texts)):
            show_table(table)
        for task in result.tasks:
            for size in task.pruned:
                _show_flips(task, size, result.order.describe(size.removals), "pruned")
    print_line(f"{result.model.computed_in(result.dtype)} on {result.device}")
    print_written(output)


def _show_comparison(result: EvalResult, other: ComparedRecord) -> None:
    """Show what another model lost against the dense one."""
    from sleb_cli.tables.comparison import comparison_tables, conclusions

    print_title(f"{other.name} against {short_name(result.model.id)}")
    for table in comparison_tables(result):
        show_table(table)
    for task in result.tasks:
        for scores in task.pruned:
            _show_flips(task, scores, other.name, "other")
    for sentence in conclusions(result):
        print_line(sentence)


def _show_flips(task: TaskResult, size: PrunedTaskScores, removed: str, model: str) -> None:
    for flip in size.flips:
        print_title(
            f"\n{task.task}, item {flip.doc_id}, which only one model gets right ({removed})"
        )
        print_line(f"  {' '.join(flip.prompt.split())[-300:]}")
        for name, text in (("right", flip.target), ("dense", flip.dense), (model, flip.pruned)):
            print_line(f"  {name:6} {' '.join(text.split())[:160]}")


def show_benchmark(result: BenchResult, output: Path | None) -> None:
    """Show the size, speed and memory of each model."""
    from sleb_cli.tables import provenance, speed
    from sleb_cli.tables.table import model_name

    print_title(short_name(result.model.id))
    for size in result.pruned:
        removed = result.order.describe(size.removals).removeprefix("without ")
        print_line(f"{model_name(size.removals)}: {removed}")
    for table in speed.benchmark_tables(result):
        show_table(table)
    show_table(provenance.result_settings(result))
    print_written(output)


def show_applied(result: ApplyResult | GgufResult) -> None:
    """Show what was written and how far it is proven."""
    if result.kind == "apply":
        _show_written(result.folder, result, result.weights_bytes)
        _show_checkpoint(result)
    else:
        _show_written(result.file, result, result.file_bytes)
        _show_gguf(result)


def _show_written(path: str, result: ApplyResult | GgufResult, size: int) -> None:
    print_to_copy(f"wrote {path}: {result.blocks} blocks, {format_bytes(size)}")
    for cut in result.cuts:
        print_line(f"{cut.title.lower()}: {cut.change}")


def _show_checkpoint(result: ApplyResult) -> None:
    from sleb_cli.tables.search_results import recovery
    from sleb_cli.tables.usage import python_lines

    if result.recovery:
        show_table(recovery(result.recovery, result.model.output), title=False)
    if result.proof:
        _show_proof(result.proof, [])
    else:
        print_line(_NOT_VERIFIED)
    folder = in_shell(result.folder)
    serve = f"pip install 'transformers[serving]' && transformers serve {folder}"
    run = f"{serve}, or vllm serve {folder}"
    better = "--recover would win back about half of what was lost, in minutes"
    if output := result.model.output:
        run = python_lines(output, result.folder)[1]
        better = "--heal would bring it closer to the dense model, in ten minutes"
    if result.removals and not result.recovery:
        print_line(better)
    print_to_copy(f"to run it: {run}")
    if not output and (Path(result.folder) / "chat_template.jinja").is_file():
        print_to_copy(f"to chat with it then, in a second terminal: transformers chat {folder}")
    print_to_copy(f"to publish it: hf upload ORG/NAME {folder} --private")


def _show_gguf(result: GgufResult) -> None:
    copied = "row" if result.cuts else "tensor"
    copies = f"every {copied} is a byte-for-byte copy from the source"
    if not result.verified:
        print_line(_NOT_VERIFIED)
    elif result.proof:
        _show_proof(result.proof, [copies])
    else:
        _show_partial("", [copies, f"logits not compared: {result.unproven}"])
    file = in_shell(result.file)
    print_to_copy(f"to run it: llama-cli -m {file}, or lms import {file} (LM Studio)")


def _show_proof(proof: Proof, clauses: list[str]) -> None:
    from sleb_cli.tables.checks import check_clauses, match_clause

    where = f" in {proof.dtype} on {proof.device}"
    if proof.partial:
        _show_partial(where, [*clauses, *check_clauses(proof), proof.partial])
    else:
        print_prose(stdout(), f"[green]proven[/]{where}: {match_clause(proof)}")


def _show_partial(where: str, clauses: list[str]) -> None:
    print_prose(stdout(), f"[yellow]partially proven[/]{where}: {escape('; '.join(clauses))}")


def show_exported(result: ExportResult) -> None:
    """Print an exported text, or the file it was written to."""
    if result.file is not None:
        print_written(Path(result.file))
    else:
        print(escape_controls(result.text or ""), end="")
