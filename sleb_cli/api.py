"""The verbs of `sleb` as functions: each takes a request, reports to `notify`, and returns a record.

The commands call these, so Python and the command line do the same. What a request names as output is written.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.atomic import require_new_file, write_text
from sleb_cli.events import Notify, Warned, ignore
from sleb_cli.plugin_manager import Registry, load_plugins
from sleb_plugins import Exporter, OutputError, UsageError
from sleb_plugins.errors import OutOfMemory, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sleb_cli.plan import Plan
    from sleb_cli.records import Record
    from sleb_cli.requests import ApplyRequest, BenchRequest, EvalRequest, ExportRequest, SearchRequest
    from sleb_cli.results import ApplyResult, BenchResult, CompareResult, EvalResult, ExportResult, GgufResult


_SEARCH = (
    "Use a smaller --memory, --batch-size or --sequence-length, fewer --samples, a narrower --dtype, or --device cpu. "
    "With --resume, nothing is measured again."
)
_APPLY = "Leave out --recover or --heal, use a smaller --sequence-length or fewer --samples, or a larger machine."
_EVALUATE = "Use a smaller --batch-size or --sequence-length, a narrower --dtype, or --device cpu."
_BENCH = "Use a smaller --batch-size or --prompt-length, a narrower --dtype, or --device cpu."


@contextmanager
def _names_memory(hint: str) -> Iterator[None]:
    """Turn an out-of-memory error that nothing below could say more about into one with a hint."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or ["no more memory"]
        raise OutOfMemory(f"Out of memory: {lines[0].rstrip('.')}.", hint=hint) from error


@_names_memory(_SEARCH)
def search(request: SearchRequest, notify: Notify = ignore) -> Plan:
    """Find the blocks that a model can do best without, and write them to a plan.

    Raises:
        SlebError: of the class that fits. What was measured stays in a journal beside the plan, for `resume`.
    """
    from sleb_cli.engine.search.journal import Journal, journal_of
    from sleb_cli.engine.search.run import find_removals

    if request.compare:
        raise UsageError("A search compares nothing.", hint="Call `compare` with this request.")
    plan = find_removals(request, _registry(notify), notify)
    _save(plan, request.plan_file)
    Journal(journal_of(request.plan_file)).delete()
    return plan


@_names_memory(_SEARCH)
def compare(request: SearchRequest, notify: Notify = ignore) -> CompareResult:
    """Search once for each entry of `request.compare`, and write the best plan.

    Raises:
        SlebError: of the class that fits.
    """
    from sleb_cli.engine.search.compare import compare_removals, delete_journals

    result, plan = compare_removals(request, _registry(notify), notify)
    _save(plan, request.plan_file)
    delete_journals(result, request.plan_file)
    return result


@_names_memory(_APPLY)
def apply(request: ApplyRequest, notify: Notify = ignore) -> ApplyResult | GgufResult:
    """Write the pruned checkpoint or GGUF file, and prove that it computes what the search measured.

    Raises:
        WorkerFinished: this process only helped to heal; the main one writes the checkpoint.
        SlebError: of the class that fits.
    """
    from sleb_cli.engine.output.apply import apply_removals, require_coherent
    from sleb_cli.engine.output.apply_gguf import apply_to_gguf, gguf_source
    from sleb_cli.engine.surgery.subject import resolve_subject

    require_coherent(request)
    file = gguf_source(request)
    registry = _registry(notify)
    if file is not None:
        return apply_to_gguf(request, file, registry, notify)
    return apply_removals(resolve_subject(request, registry, notify, needs_removals=True), request, notify)


@_names_memory(_EVALUATE)
def evaluate(request: EvalRequest, notify: Notify = ignore) -> EvalResult:
    """Measure the quality of a model, dense beside pruned: perplexity and lm-eval tasks.

    Raises:
        SlebError: of the class that fits.
    """
    from sleb_cli.engine.quality.evaluation import evaluate_subject
    from sleb_cli.engine.surgery.subject import resolve_subject

    _require_result_file(request)
    result = evaluate_subject(resolve_subject(request, _registry(notify), notify), request, notify)
    _save(result, request.output)
    return result


@_names_memory(_BENCH)
def bench(request: BenchRequest, notify: Notify = ignore) -> BenchResult:
    """Measure speed and memory of a model, dense and pruned in alternation.

    Raises:
        SlebError: of the class that fits.
    """
    from sleb_cli.engine.speed.benchmark import benchmark
    from sleb_cli.engine.surgery.subject import resolve_subject

    _require_result_file(request)
    result = benchmark(resolve_subject(request, _registry(notify), notify), request, notify)
    _save(result, request.output)
    return result


@_names_memory(_APPLY)
def export(request: ExportRequest, notify: Notify = ignore) -> ExportResult:
    """Export the pruned model for another tool, as files or as text.

    Raises:
        SlebError: of the class that fits.
    """
    from sleb_cli.engine.output.export import describe_pruning, export_files, export_text
    from sleb_cli.engine.surgery.subject import resolve_subject

    registry = _registry(notify)
    exporter = registry.exporter(request.to)
    if isinstance(exporter, Exporter):
        _require_result_file(request)
    subject = resolve_subject(request, registry, notify, needs_removals=True)
    pruning = describe_pruning(subject, exporter, request.source)
    if not isinstance(exporter, Exporter):
        return export_files(exporter, subject, pruning, request, registry, notify)
    result = export_text(exporter, pruning)
    if request.output is not None:
        write_text(request.output, result.text or "")
    return result


def _registry(notify: Notify) -> Registry:
    """Load the plugins, and warn of each that fails."""
    registry = load_plugins()
    for failure in registry.failures:
        notify(Warned(f"The plugin {failure.plugin} failed to load and is left out: {failure.reason}."))
    return registry


def _require_result_file(request: EvalRequest | BenchRequest | ExportRequest) -> None:
    if request.output is not None:
        require_new_file(request.output, force=request.force)


def _save(record: Record, path: Path | None) -> None:
    """Write a result, if a file was named.

    Raises:
        OutputError: the file cannot be written; the error carries the result, so that nothing is lost.
    """
    if path is None:
        return
    try:
        record.write(path)
    except OutputError as error:
        error.unsaved = record.to_data()
        raise
