"""Check requests of `apply`, `eval`, `bench` and `export` before the model is looked for."""

import re
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from sleb_cli.atomic import require_new_file
from sleb_cli.checks.clashes import FOR_CHECKPOINTS, given
from sleb_cli.checks.places import require_new_place
from sleb_cli.checks.subjects import (
    NamedSubject,
    first_removals,
    is_plan,
    read_named_plan,
    read_pair,
    read_subject,
)
from sleb_cli.checks.text_names import require_measures, require_mixture
from sleb_cli.plan import CHECKPOINT_PLAN, no_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import is_main_process
from sleb_cli.records import UnreadableRecord
from sleb_cli.requests import (
    AUTO,
    DEFAULT_PLAN,
    DEFAULT_SHARD_SIZE,
    ApplyRequest,
    BenchRequest,
    EvalRequest,
    ExportRequest,
    option_of,
)
from sleb_cli.results import EvalResult
from sleb_cli.texts.corpus_files import require_corpus
from sleb_cli.units import dtype_in_full, parse_bytes
from sleb_plugins import DataError, Engine, Exporter, OutputError, UsageError
from sleb_plugins.errors import did_you_mean

_SWEPT = {"batch": "batch_size", "prompt": "prompt_length", "new": "new_tokens"}
"""What a sweep can vary, and the option for one value of it."""


def check_apply(request: ApplyRequest, registry: Registry) -> NamedSubject:
    """Check a request, and return what it names.

    Raises:
        UsageError: options contradict each other, or the blocks or their number do not fit.
        PlanError: the plan is unreadable.
        DataError: a text is missing.
        OutputError: the output exists, or cannot be written.
    """
    if request.source is not None and request.blocks is not None and request.subject is None:
        removals = first_removals(request.blocks, request.remove, "--blocks")
        subject = NamedSubject(request, str(request.source), removals)
    else:
        subject = read_subject(
            request, needs_removals=not (request.scripts or request.experts_per_token)
        )
    gguf = _gguf_to_cut(request, Path(subject.model))
    dtype_in_full(request.dtype or AUTO)
    require_mixture(request.calibration)
    parse_shard_size(request)
    if is_main_process():
        failed = request.keep_failed
        if failed is not None and failed.exists():
            raise OutputError(
                f"{failed} already exists.", hint="Choose another folder with --keep-failed."
            )
        if request.output is not None:
            require_new_place(request.output, gguf, force=request.force)
    return replace(subject, gguf=gguf)


def parse_shard_size(request: ApplyRequest) -> int:
    """Return the bytes of the largest weight file of a checkpoint.

    Raises:
        UsageError: it is not a size.
    """
    return parse_bytes(str(request.max_shard_size or DEFAULT_SHARD_SIZE), "--max-shard-size")


def _gguf_to_cut(request: ApplyRequest, model: Path) -> Path | None:
    """Return the GGUF file to remove blocks from; None if a checkpoint is to be written.

    A GGUF file is written from --source or a GGUF model, unless the output or another option asks
    for a checkpoint.
    """
    gguf_model = model if model.suffix == ".gguf" and not model.is_dir() else None
    names_file = request.output is not None and request.output.suffix == ".gguf"
    if request.source is None and gguf_model is None and names_file:
        raise UsageError(
            f"{request.output} can only be made from a GGUF file of the model.",
            hint="Name that file with --source, or choose a folder with -o.",
        )
    if request.source is not None:
        return request.source
    names_folder = request.output is not None and not names_file
    if names_folder or given(request, FOR_CHECKPOINTS):
        return None
    return gguf_model


def check_evaluation(request: EvalRequest, registry: Registry) -> NamedSubject:
    """Check a request.

    Raises:
        UsageError: options contradict each other, or a number or the blocks do not fit.
        PlanError: the plan is unreadable.
        DataError: a text, a task, the corpus or the folder of tasks is missing.
        OutputError: the output exists, or cannot be written.
    """
    _require_new(request)
    parse_batch_size(request.batch_size)
    dtype_in_full(request.dtype or AUTO)
    # Tasks of a folder are not among the known ones.
    require_measures(request.perplexity, () if request.include_path else request.tasks)
    if request.corpus is not None:
        require_corpus(request.corpus)
    if request.include_path is not None and not request.include_path.is_dir():
        raise DataError(f"There is no folder {request.include_path}.", hint="Check --include-path.")
    return read_pair(request) if request.against else read_subject(request)


def parse_batch_size(asked: str | int) -> int | None:
    """Return a number of windows or requests; None to suit the device.

    Raises:
        UsageError: it is not a number above 0.
    """
    if asked == AUTO:
        return None
    if not re.fullmatch(r"[1-9]\d{,11}", str(asked), re.ASCII):
        raise UsageError(
            f"--batch-size {asked} is not a number of 1 to 999,999,999,999.", hint="Use 8, or auto."
        )
    return int(asked)


def check_bench(request: BenchRequest, registry: Registry) -> tuple[NamedSubject, Engine | None]:
    """Check a request; return what it names, and the engine, or None for transformers.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        PlanError: the plan is unreadable.
        OutputError: the output exists, or cannot be written.
        MachineError: the engine is not installed.
    """
    _require_new(request)
    engine: Engine | None = registry.choose("engine", request.engine).value
    if engine and (unused := given(request, "dtype" if engine.reads == "gguf" else "source")):
        raise UsageError(
            f"{unused[0]} does not apply to --engine {engine.name}.", hint=f"Leave out {unused[0]}."
        )
    dtype_in_full(request.dtype or AUTO)
    points_of(request)
    subject = read_subject(request)
    if engine:
        engine.version()  # one that is not installed is named before a model is downloaded
    return subject, engine


def points_of(request: BenchRequest) -> list[BenchRequest]:
    """Return a request for each combination of the sweep's values; just this one without a sweep.

    Raises:
        UsageError: the sweep is unreadable, or sets what another option sets.
    """
    values: dict[str, list[int]] = {}
    for entry in " ".join(request.sweep).split():
        name, _, numbers = entry.partition("=")
        if name not in _SWEPT:
            hint = did_you_mean(
                name, list(_SWEPT), otherwise="Write it like batch=1,8,32 prompt=128,2048 new=64."
            )
            raise UsageError(f"--sweep cannot vary {name!r}.", hint=hint)
        field = _SWEPT[name]
        if field in values or getattr(request, field) is not None:
            other = "twice" if field in values else f"and so does {option_of(field)}"
            raise UsageError(f"--sweep sets {name} {other}.", hint=f"Set it once: {name}=1,8.")
        try:
            values[field] = list(map(int, numbers.split(",")))
        except ValueError as error:
            raise UsageError(
                f"--sweep {entry!r} is not a name and a list of numbers.",
                hint="Write it like batch=1,8,32.",
            ) from error
    requests = []
    for point in product(*values.values()):
        fields: dict[str, Any] = dict(zip(values, point, strict=True))
        requests.append(replace(request, **fields))
    return requests


def check_export(request: ExportRequest, registry: Registry) -> tuple[list[NamedSubject], Exporter]:
    """Check a request; return what it names, and the format.

    A format that needs no model gets only plans.

    Raises:
        UsageError: the format does not use the given source file, or describes only plans or only
            one, or no block is removed.
        PlanError: the plan is unreadable.
        OutputError: the output exists, or cannot be written.
    """
    exporter: Exporter = registry.choose("exporter", request.to).value
    if request.source is not None and not exporter.uses_source:
        raise UsageError(
            f"--source does not apply to --to {exporter.name}.", hint="Leave out --source."
        )
    if request.more and (exporter.needs_model or not exporter.several):
        raise UsageError(
            f"--to {exporter.name} describes one plan, not {1 + len(request.more)}.",
            hint="Name one of them, or use --to table.",
        )
    _require_new(request)
    if exporter.needs_model:
        subject = read_subject(request, needs_removals=True)
        if subject.plan and not subject.plan.order.whole_blocks:
            raise UsageError(
                f"--to {exporter.name} describes a removal of blocks, but {subject.file} removes "
                f"{subject.plan.unit}.",
                hint="Use --to report or table, or write the checkpoint with `sleb apply`.",
            )
        return [subject], exporter
    subjects = []
    for named in (request.subject or DEFAULT_PLAN, *request.more):
        inside = Path(named) / CHECKPOINT_PLAN
        file = inside if inside.is_file() else Path(named)
        if not is_plan(file):
            if request.blocks is None and not file.exists():
                raise no_plan(file)
            raise UsageError(
                f"--to {request.to} describes a plan, but {file} is a model.",
                hint="Name a plan of `sleb search`.",
            )
        comparison = _read_comparison(file)
        if comparison:
            if not exporter.compares or request.more:
                raise UsageError(
                    f"{file} compares two models, and is shown alone, by --to report or table.",
                    hint=f"sleb export {file} --to report",
                )
            model = comparison.model.id
            subjects.append(NamedSubject(request, model, (), file=file, comparison=comparison))
            continue
        plan = read_named_plan(file, request)
        # Not looked for: the model may be on another machine.
        subjects.append(NamedSubject(request, plan.model.id, plan.removals, plan=plan, file=file))
    return subjects, exporter


def _read_comparison(file: Path) -> EvalResult | None:
    """Read what `eval --against` wrote; None if the file is none of these."""
    with suppress(UnreadableRecord, FileNotFoundError):
        result = EvalResult.read(file, "the result")
        if result.compared:
            return result
    return None


def _require_new(request: EvalRequest | BenchRequest | ExportRequest) -> None:
    if request.output is not None and is_main_process():
        require_new_file(request.output, force=request.force)
