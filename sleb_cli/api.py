"""The commands as functions: each takes a request, reports to `notify`, writes its output, and
returns a record.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from sleb_cli.events import Notify, ignore
from sleb_cli.plugin_manager import Registry, load_registry
from sleb_cli.processes import WorkerFinished, is_main_process, process_count
from sleb_cli.requests import AUTO, BenchRequest, EvalRequest, Request, journal_of, sibling
from sleb_plugins import OutputError, UsageError
from sleb_plugins.errors import explain_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sleb_cli.checks.subjects import NamedSubject
    from sleb_cli.engine.model.source import ModelSource
    from sleb_cli.engine.process_group import ProcessGroup
    from sleb_cli.engine.surgery.subject import Subject
    from sleb_cli.plan import Plan
    from sleb_cli.records import Record
    from sleb_cli.requests import ApplyRequest, ExportRequest, SearchRequest
    from sleb_cli.results import ApplyResult, BenchResult, EvalResult, ExportResult, GgufResult
    from sleb_plugins import Exporter


Q = TypeVar("Q", bound=Request)
Checked = TypeVar("Checked")
Files = TypeVar("Files")

_SEARCH = (
    "Use a smaller --memory, --batch-size or --sequence-length, fewer --samples, a narrower "
    "--dtype, or --device cpu. "
    "With --resume, nothing is measured again."
)
_APPLY = "Leave out --recover or --heal, use a smaller --sequence-length or fewer --samples, or a larger machine."
_EXPORT = "Use a machine with more memory."
_EVALUATE = "Use a smaller --batch-size or --sequence-length, a narrower --dtype, or --device cpu."
_BENCH = "Use a smaller --batch-size or --prompt-length, a narrower --dtype, or --device cpu."


@explain_out_of_memory(None, _SEARCH)
def search(request: SearchRequest, notify: Notify = ignore) -> Plan:
    """Find the blocks or experts that a model needs least, and write them to a plan.

    Raises:
        WorkerFinished: this process only helped; the main one writes the plan.
        SlebError: something failed. A journal next to the plan keeps what was measured, for
            `resume`.
    """
    from sleb_cli.atomic import only_writer
    from sleb_cli.checks.searches import check_search
    from sleb_cli.engine.door.files import locate

    with only_writer(request.plan_file) if is_main_process() else nullcontext():
        with _working(
            check_search, lambda search: locate(search.named, notify), request, notify
        ) as work:
            from sleb_cli.engine.door.search import resolve_search
            from sleb_cli.engine.search.journal import delete_journal
            from sleb_cli.engine.search.run import find_removals

            group, registry, settings, source = work
            plan = find_removals(
                resolve_search(settings, source, registry, notify, group), group, notify
            )
        _save(plan, request.plan_file)
        delete_journal(journal_of(request.plan_file), notify)
    return plan


@explain_out_of_memory(None, _APPLY)
def apply(request: ApplyRequest, notify: Notify = ignore) -> ApplyResult | GgufResult:
    """Write the pruned checkpoint or GGUF file, and prove that it computes what the search
    measured.

    Raises:
        WorkerFinished: this process only helped to recover; the main one writes the checkpoint.
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.checks.verbs import check_apply
    from sleb_cli.engine.door.files import locate_to_cut

    alone = not request.recoveries
    with _working(
        check_apply, lambda named: locate_to_cut(named, notify), request, notify, alone=alone
    ) as work:
        from sleb_cli.engine.door.apply import resolve_apply

        group, registry, named, source = work
        return resolve_apply(request, named, source, registry, notify, group)()


@explain_out_of_memory(None, _EVALUATE)
def evaluate(request: EvalRequest, notify: Notify = ignore) -> EvalResult:
    """Measure the quality of a model, dense and pruned: perplexity and lm-eval tasks.

    Raises:
        WorkerFinished: this process only helped; the main one writes the result.
        SlebError: something failed; its class tells what. Finished texts and tasks are saved next
            to the plan or `request.output`, and a repeated request continues from there.
    """
    from sleb_cli.checks.verbs import check_evaluation
    from sleb_cli.engine.door.files import locate

    with _working(check_evaluation, lambda named: locate(named, notify), request, notify) as work:
        from sleb_cli.engine.door.evaluate import resolve_evaluation
        from sleb_cli.engine.quality.evaluation import evaluate_models

        group, registry, named, source = work
        evaluation = resolve_evaluation(request, named, source, registry, notify, group)
        file = _results_file(evaluation.models.subject, "eval")
        unfinished = (
            sibling(request.output, ".unfinished.json") if request.output and not file else None
        )
        result = evaluate_models(evaluation, file or unfinished)
    _save(result, request.output)
    if unfinished:
        unfinished.unlink(missing_ok=True)
    return result


@explain_out_of_memory(None, _BENCH)
def bench(request: BenchRequest, notify: Notify = ignore) -> BenchResult:
    """Measure the speed and memory of a model, dense and pruned in turn.

    Raises:
        WorkerFinished: this process is one of several, which the main one refuses.
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.checks.verbs import check_bench
    from sleb_cli.engine.door.files import locate
    from sleb_cli.saved_results import save_result

    count = process_count()
    if (
        is_main_process() and count > 1
    ):  # a launcher gives each process a share of the threads, or an idle device
        raise UsageError(
            f"`bench` times models in one process, not in {count}.",
            hint="Run it without the launcher.",
        )
    with _working(
        check_bench, lambda checked: locate(checked[0], notify), request, notify, alone=True
    ) as work:
        from sleb_cli.engine.door.bench import resolve_bench
        from sleb_cli.engine.output.engine_files import engine_files
        from sleb_cli.engine.speed.benchmark import benchmark

        _, registry, (named, engine), source = work
        settings = resolve_bench(request, named, engine, source, registry, notify)
        dense = settings.engine_source
        files = engine_files(dense, registry, notify) if dense else nullcontext()
        with settings.subject.architecture.source.watch.unchanged(), files as write_files:
            result = benchmark(settings, notify, write_files)
    _save(result, request.output)
    if file := _results_file(settings.subject, "bench"):
        # Weights and data types may differ between engines, so each has its own file.
        save_result(result, file.with_suffix(f".{engine.name}.json") if engine else file, notify)
    return result


@explain_out_of_memory(None, _EXPORT)
def export(request: ExportRequest, notify: Notify = ignore) -> ExportResult:
    """Export a report, a table of plans, or the removals for another tool.

    Raises:
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.atomic import write_text
    from sleb_cli.checks.verbs import check_export
    from sleb_cli.engine.door.files import locate

    def find(checked: tuple[list[NamedSubject], Exporter]) -> ModelSource | None:
        (named, *_), exporter = checked
        suffices = not exporter.needs_model or (named.plan and exporter.plan_suffices)
        return None if suffices else locate(named, notify)

    with _working(check_export, find, request, notify, alone=True) as work:
        from sleb_cli.engine.door.export import resolve_export
        from sleb_cli.records import THIS_VERSION
        from sleb_cli.results import ExportResult

        _, registry, (named, exporter), source = work
        pruning, output = resolve_export(request, named, exporter, source, registry, notify)
        text = exporter.export(pruning)
    if output is not None:
        write_text(output, text, replace=request.force)
    file, shown = (str(output), None) if output else (None, text)
    return ExportResult(
        **THIS_VERSION, kind="export", exporter=exporter.name, text=shown, file=file
    )


def _results_file(subject: Subject, kind: Literal["eval", "bench"]) -> Path | None:
    """Return where results are saved: next to their plan, or in the measured checkpoint if sleb
    wrote it.
    """
    from sleb_cli.plan import CHECKPOINT_PLAN
    from sleb_cli.saved_results import beside_plan

    if subject.file is not None:
        return beside_plan(subject.file, kind) if subject.own_plan else None
    source = subject.architecture.source
    ours = (
        not subject.surgery.cuts
        and source.revision is None
        and (source.folder / CHECKPOINT_PLAN).is_file()
    )
    return source.folder / f"sleb_{kind}.json" if ours else None


@contextmanager
def _working(
    check: Callable[[Q, Registry], Checked],
    find: Callable[[Checked], Files],
    request: Q,
    notify: Notify,
    *,
    alone: bool = False,
) -> Iterator[tuple[ProcessGroup, Registry, Checked, Files]]:
    """Check a request and find its files before torch is imported, and let the processes work
    together.

    They end together if one fails. After the body, or with `alone` from the start, only the main
    process goes on.
    """

    def prepare() -> tuple[Registry, Checked, Files]:
        require_coherent(request)  # needs no plugins, which take time to load
        registry = load_registry(notify)
        checked = check(request, registry)
        _require_device(request)
        return registry, checked, find(checked)

    from sleb_cli.checks.clashes import require_coherent
    from sleb_cli.engine.process_group import ProcessGroup, join_processes

    if alone and not is_main_process():
        raise WorkerFinished
    early = prepare() if alone or process_count() == 1 else None
    with nullcontext(ProcessGroup()) if early else join_processes() as group:
        yield group, *(early or group.main_first(prepare))
        if not group.is_main:
            raise WorkerFinished


def _require_device(request: Request) -> None:
    """Check that the named device is there, before a model is downloaded for it."""
    if (device := getattr(request, "device", AUTO)) not in (AUTO, "cpu"):
        from sleb_cli.engine.device import choose_device  # which imports torch

        choose_device(device)


def _save(record: Record, path: Path | None) -> None:
    if path is not None:
        try:
            record.write(path)
        except OutputError as error:
            error.unsaved = record.to_data()  # `main` prints it, so that hours of work are not lost
            raise
