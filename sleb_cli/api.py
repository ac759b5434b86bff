"""The commands as functions of a request, which write their output and return a record."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from sleb_cli.events import Notice, Notify, ignore
from sleb_cli.plugin_manager import Registry, load_registry
from sleb_cli.processes import WorkerFinished, is_main_process, process_count
from sleb_cli.requests import (
    AUTO,
    BenchRequest,
    EvalRequest,
    Request,
    journal_of,
    option_of,
    sibling,
)
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


@explain_out_of_memory(
    None,
    "Use a smaller --memory, --batch-size or --sequence-length, fewer --samples, a narrower "
    "--dtype, or --device cpu. With --resume, nothing is measured again.",
)
def search(request: SearchRequest, notify: Notify = ignore) -> Plan:
    """Find the blocks or experts that a model needs least, and write them to a plan.

    Raises:
        WorkerFinished: this process only helped; the main one writes the plan.
        SlebError: something failed. A journal next to the plan keeps what was measured, for
            `resume`.
    """
    from sleb_cli.atomic import only_writer
    from sleb_cli.checks.searches import check_search
    from sleb_cli.engine.door.files import locate, require_possible

    with only_writer(request.plan_file) if is_main_process() else nullcontext():
        with _prepared(
            check_search, lambda search, notify: locate(search.named, notify), request, notify
        ) as ready:
            require_possible(ready.checked, ready.files, ready.registry)
            from sleb_cli.engine.door.search import resolve_search  # which imports torch
            from sleb_cli.engine.search.journal import delete_journal
            from sleb_cli.engine.search.run import find_removals

            search = resolve_search(ready.checked, ready.files, ready.registry, notify, ready.group)
            plan = find_removals(search, ready.group, notify)
        _save(plan, request.plan_file)
        delete_journal(journal_of(request.plan_file), notify)
    return plan


@explain_out_of_memory(
    None,
    "Leave out --recover or --heal, use a smaller --sequence-length or fewer --samples, or a "
    "larger machine.",
)
def apply(request: ApplyRequest, notify: Notify = ignore) -> ApplyResult | GgufResult:
    """Write the pruned checkpoint or GGUF file, and prove that it computes what the search
    measured.

    Raises:
        WorkerFinished: this process is one of several, of which only the main one works.
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.checks.verbs import check_apply
    from sleb_cli.engine.door.files import locate_to_cut

    count = process_count()
    if request.recoveries and is_main_process() and count > 1:
        raise UsageError(
            f"{option_of(request.recoveries[0])} works in one process, not in {count}.",
            hint="Run it without the launcher. A model that does not fit on one device is trained "
            "with TRL and accelerate instead: see docs/fine-tune.md.",
        )
    with _prepared(check_apply, locate_to_cut, request, notify, alone=True) as ready:
        from sleb_cli.engine.door.apply import resolve_apply

        write = resolve_apply(request, ready.checked, ready.files, ready.registry, notify)
        return write()


@explain_out_of_memory(
    None,
    "Use a smaller --batch-size or --sequence-length, a narrower --dtype, or --device cpu.",
)
def evaluate(request: EvalRequest, notify: Notify = ignore) -> EvalResult:
    """Measure the quality of a model, dense and pruned: perplexity and lm-eval tasks.

    Raises:
        WorkerFinished: this process only helped; the main one writes the result.
        SlebError: something failed; its class tells what. Finished texts and tasks are saved next
            to the plan or `request.output`, and a repeated request continues from there.
    """
    from sleb_cli.checks.verbs import check_evaluation
    from sleb_cli.engine.door.files import locate_pair
    from sleb_cli.saved_results import delete_results

    with _prepared(check_evaluation, locate_pair, request, notify) as ready:
        from sleb_cli.engine.door.evaluate import resolve_evaluation
        from sleb_cli.engine.quality.evaluation import evaluate_models

        evaluation = resolve_evaluation(
            request, ready.checked, ready.files, ready.registry, notify, ready.group
        )
        folder = _results_folder(evaluation.models.subject)
        unfinished = None
        if folder is None and request.output is not None:
            unfinished = sibling(request.output, ".unfinished")
        result = evaluate_models(evaluation, folder or unfinished)
    _save(result, request.output)
    _tell_kept(folder, notify)
    if unfinished is not None:
        delete_results(unfinished)
    return result


@explain_out_of_memory(
    None,
    "Use a smaller --batch-size or --prompt-length, a narrower --dtype, or --device cpu.",
)
def bench(request: BenchRequest, notify: Notify = ignore) -> BenchResult:
    """Measure the speed and memory of a model, dense and pruned in turn.

    Raises:
        WorkerFinished: this process is one of several, which the main one refuses.
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.checks.verbs import check_bench
    from sleb_cli.engine.door.files import locate
    from sleb_cli.saved_results import keep_result

    count = process_count()
    # A launcher gives each process a share of the threads, or an idle device.
    if is_main_process() and count > 1:
        raise UsageError(
            f"`bench` times models in one process, not in {count}.",
            hint="Run it without the launcher.",
        )

    with _prepared(
        check_bench, lambda checked, notify: locate(checked[0], notify), request, notify, alone=True
    ) as ready:
        from sleb_cli.engine.door.bench import resolve_bench
        from sleb_cli.engine.output.engine_files import engine_files
        from sleb_cli.engine.speed.benchmark import benchmark

        named, engine = ready.checked
        settings = resolve_bench(request, named, engine, ready.files, ready.registry, notify)
        dense = settings.engine_source
        files = engine_files(dense, ready.registry, notify) if dense else nullcontext()
        with settings.subject.architecture.source.watch.unchanged(), files as write_files:
            result = benchmark(settings, notify, write_files)
    _save(result, request.output)
    folder = _results_folder(settings.subject)
    if folder is not None:
        for timed in result.workloads:
            item_key = {
                "workload": timed.workload.to_data(),
                "engine": timed.engine_version,
                "attention": timed.attention,
            }
            keep_result(result.model_copy(update={"workloads": (timed,)}), item_key, folder, notify)
    _tell_kept(folder, notify)
    return result


@explain_out_of_memory(
    None,
    "Use a machine with more memory.",
)
def export(request: ExportRequest, notify: Notify = ignore) -> ExportResult:
    """Export a report, a table of plans, or the removals for another tool.

    Raises:
        SlebError: something failed; its class tells what.
    """
    from sleb_cli.atomic import write_text
    from sleb_cli.checks.verbs import check_export
    from sleb_cli.engine.door.files import locate

    def find(checked: tuple[list[NamedSubject], Exporter], notify: Notify) -> ModelSource | None:
        subjects, exporter = checked
        if not exporter.needs_model or (subjects[0].plan and exporter.plan_suffices):
            return None
        return locate(subjects[0], notify)

    with _prepared(check_export, find, request, notify, alone=True) as ready:
        from sleb_cli.engine.door.export import resolve_export
        from sleb_cli.records import THIS_VERSION
        from sleb_cli.results import ExportResult

        named, exporter = ready.checked
        pruning, output = resolve_export(
            request, named, exporter, ready.files, ready.registry, notify
        )
        text = exporter.export(pruning)
    shown: str | None = None
    if output is not None:
        write_text(output, text, replace=request.force)
    else:
        assert isinstance(text, str)
        shown = text
    return ExportResult(
        **THIS_VERSION,
        kind="export",
        exporter=exporter.name,
        text=shown,
        file=str(output) if output else None,
    )


def _results_folder(subject: Subject) -> Path | None:
    """Return where results are kept: next to their plan, or in a checkpoint that sleb wrote."""
    from sleb_cli.plan import CHECKPOINT_PLAN
    from sleb_cli.saved_results import CHECKPOINT_RESULTS, results_folder

    if subject.file is not None:
        return results_folder(subject.file) if subject.own_plan else None
    source = subject.architecture.source
    if subject.other or subject.surgery.cuts or source.revision is not None:
        return None
    is_ours = (source.folder / CHECKPOINT_PLAN).is_file()
    return source.folder / CHECKPOINT_RESULTS if is_ours else None


def _tell_kept(folder: Path | None, notify: Notify) -> None:
    if folder is not None and folder.is_dir():  # not if its place is read-only
        notify(Notice(f"Kept in {folder}, for `sleb export`."))


@dataclass(frozen=True)
class _Prepared(Generic[Checked, Files]):
    """A checked request, the files that it names, and the processes that work on it."""

    registry: Registry
    checked: Checked
    files: Files
    group: ProcessGroup


@contextmanager
def _prepared(
    check: Callable[[Q, Registry], Checked],
    find: Callable[[Checked, Notify], Files],
    request: Q,
    notify: Notify,
    *,
    alone: bool = False,
) -> Iterator[_Prepared[Checked, Files]]:
    """Check a request and find its files before torch is imported; join the processes.

    They end together if one fails. After the body, or with `alone` from the start, only the main
    process goes on.
    """
    from sleb_cli.checks.clashes import require_coherent
    from sleb_cli.engine.process_group import ProcessGroup, join_processes
    from sleb_cli.engine.third_party import disable_hub_kernels

    def prepare(group: ProcessGroup) -> _Prepared[Checked, Files]:
        require_coherent(request)  # needs no plugins, which take time to load
        registry = load_registry(notify)
        checked = check(request, registry)
        device = getattr(request, "device", AUTO)
        if device not in (AUTO, "cpu"):  # before a model is downloaded for it
            from sleb_cli.engine.device import choose_device  # which imports torch

            choose_device(device)
        return _Prepared(registry, checked, find(checked, notify), group)

    if alone and not is_main_process():
        raise WorkerFinished
    with ExitStack() as stack:
        stack.callback(disable_hub_kernels())
        if alone or process_count() == 1:
            yield prepare(ProcessGroup())
            return
        group = stack.enter_context(join_processes())
        yield group.main_first(lambda: prepare(group))
        if not group.is_main:
            raise WorkerFinished


def _save(record: Record, path: Path | None) -> None:
    if path is None:
        return
    try:
        record.write(path)
    except OutputError as error:
        error.unsaved = record.to_data()  # `main` prints it, so that hours of work are not lost
        raise
