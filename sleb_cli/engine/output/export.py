"""`sleb export`: the removals in another tool's notation, or the files that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleb_cli.atomic import new_file, new_folder, require_new_file, write_text
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.door.subject import is_plan, read_named_plan, resolve_subject
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.gguf.surgery import plan_gguf_surgery
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.output.apply import Output, claimed, default_folder, require_new_folder, write_checkpoint
from sleb_cli.engine.output.apply_gguf import default_place, prune_gguf, require_new_gguf, require_same_kind_of_model
from sleb_cli.engine.output.measured import measured_of_plan
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plan import CHECKPOINT_PLAN, Plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEFAULT_PLAN, ExportRequest, sibling
from sleb_cli.results import ApplyResult, BenchResult, EvalResult, ExportResult, GgufResult
from sleb_cli.version import __version__
from sleb_plugins import Exporter, FileExporter, OutputError, PluginError, Pruning, UsageError


def export_request(request: ExportRequest, registry: Registry, notify: Notify) -> ExportResult:
    """Export the removals that a request names, as text or as files.

    Raises:
        PlanError: the plan is unreadable, or was made for another model.
        UsageError: no block is removed, the format does not use the given source file, or describes only plans.
        ProofError: what was written does not compute what it should.
        OutputError: it exists, or cannot be written.
    """
    exporter: Exporter | FileExporter = registry.choose("exporter", request.to).value
    if isinstance(exporter, Exporter) and request.output is not None:
        require_new_file(request.output, force=request.force)
    if request.source is not None and not exporter.uses_source:
        raise UsageError(f"--source does not apply to --to {exporter.name}.", hint="Leave out --source.")
    subject = resolve_subject(request, registry, notify, needs_removals=True) if exporter.needs_model else None
    if subject:
        pruning = _pruning_of_model(subject, request, notify)
    else:
        pruning = _pruning_of_plan(request, exporter.name, notify)
    if not pruning.removals:
        raise UsageError("Nothing to export: no block is removed.", hint="Name a plan, or use --blocks.")
    if isinstance(exporter, Exporter):
        text = exporter.render(pruning)
        if request.output is not None:
            write_text(request.output, text)
        return _result(exporter.name, text=text, document=exporter.document(pruning))
    writer = _EngineWriter(exporter.name, pruning, subject, request, registry, notify)
    lines = tuple(exporter.export(pruning, request.output, writer))
    return _result(exporter.name, written=tuple(writer.written), files=tuple(map(str, writer.files)), lines=lines)


def _result(exporter: str, **made: Any) -> ExportResult:
    return ExportResult(schema_version=1, sleb_version=__version__, kind="export", exporter=exporter, **made)


def _pruning_of_model(subject: Subject, request: ExportRequest, notify: Notify) -> Pruning:
    architecture = subject.architecture
    source = architecture.source
    own_file = Path(source.id) if source.id.endswith(".gguf") else None
    measured = _measured(subject.file, subject.plan, notify) if subject.file and subject.plan else {}
    return Pruning(
        # Other tools cannot resolve "demo" or our cache of converted GGUF files, so they get the folder.
        model=str(source.folder) if own_file or source.id == DEMO else source.id,
        revision=source.revision,
        dtype=dtype_name(architecture.dtype) if architecture.dtype else "float32",
        blocks=architecture.block_count,
        removals=subject.surgery.removals,
        source_file=request.source or own_file,
        **measured,
    )


def _pruning_of_plan(request: ExportRequest, to: str, notify: Notify) -> Pruning:
    """Describe a plan from its files alone: the model may be on another machine."""
    named = Path(request.subject or DEFAULT_PLAN)
    file = named / CHECKPOINT_PLAN if (named / CHECKPOINT_PLAN).is_file() else named
    if not is_plan(str(file)):
        raise UsageError(f"--to {to} describes a plan, but {named} is a model.", hint="Name a plan of `sleb search`.")
    plan = read_named_plan(file, request)
    return Pruning(
        model=plan.model.id,
        revision=plan.model.revision,
        dtype=plan.model.dtype or plan.search.dtype,
        blocks=plan.model.blocks,
        removals=plan.removals,
        source_file=request.source,
        **_measured(file, plan, notify),
    )


def _measured(file: Path, plan: Plan, notify: Notify) -> dict[str, Any]:
    """Return the fields for the plan and what was measured of it, all fit to be published."""
    evaluation = measured_of_plan(EvalResult, file, plan, notify)
    benchmark = measured_of_plan(BenchResult, file, plan, notify)
    return {
        "plan_file": file,
        "plan": plan.published().to_data(),
        "evaluation": evaluation and evaluation.to_data(),
        "benchmark": benchmark and benchmark.to_data(),
    }


@dataclass(frozen=True)
class _EngineWriter:
    """What the engine offers to exporters: see `sleb_plugins.ArtifactWriter`."""

    exporter: str
    pruning: Pruning
    subject: Subject | None
    request: ExportRequest
    registry: Registry
    notify: Notify
    written: list[ApplyResult | GgufResult] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def _subject(self) -> Subject:
        if self.subject is None:
            raise PluginError(
                f"The exporter {self.exporter!r} wants to write a model, but declares that it needs none.",
                hint="Its author must set needs_model = True.",
            )
        return self.subject

    def write_checkpoint(self, output: Path | None, check: Callable[[Path], None] | None = None) -> Path:
        folder, force = output or default_folder(self._subject), self.request.force
        require_new_folder(folder, self._subject.architecture.source, force=force)
        to = Output(folder, force)
        with claimed(self._subject, to) as aside:
            result = write_checkpoint(self._subject, aside, to, self.notify)
            if check:
                check(aside)
        self.written.append(result)
        return Path(result.folder)

    def write_gguf(self, source: Path, output: Path | None) -> Path:
        file = read_gguf(source)
        if not self.request.any_model:
            require_same_kind_of_model(self._subject.architecture.record, file, self.notify)
        removals = self._subject.surgery.removals
        to = Output(output or default_place(file, removals), self.request.force)
        require_new_gguf(to, source)
        result = prune_gguf(plan_gguf_surgery(file, removals), to, self.registry, self.notify)
        self.written.append(result)
        return Path(result.file)

    def write_file(self, content: bytes, output: Path | None, ending: str) -> Path:
        path = output or self._default(ending)
        with new_file(path, replace=self.request.force) as aside:
            aside.write_bytes(content)
        self.files.append(path)
        return path

    def write_folder(self, files: Mapping[str, bytes], output: Path | None, ending: str) -> Path:
        folder, force = output or self._default(ending), self.request.force
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"Cannot write {folder}: it is a file.", hint="Choose another folder with -o.")
        if force and folder.exists() and (others := sorted({path.name for path in folder.iterdir()} - files.keys())):
            raise OutputError(
                f"{folder} holds other files, such as {others[0]}, and is not replaced.",
                hint="Choose another folder with -o.",
            )
        with new_folder(folder, replace=force) as aside:
            for name, content in files.items():
                (aside / name).write_bytes(content)
        self.files.append(folder)
        return folder

    def _default(self, ending: str) -> Path:
        """Return a path named after the plan, next to it; without a plan, one named after the model."""
        if self.pruning.plan_file is not None:
            return sibling(self.pruning.plan_file, ending)
        return Path(Path(self.pruning.model).name + ending)
