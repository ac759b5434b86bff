"""`sleb export`: the removals in another tool's notation, or the files that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.output.apply import apply_removals
from sleb_cli.engine.output.apply_gguf import prune_gguf, require_same_kind_of_model
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import ApplyRequest, ExportRequest
from sleb_cli.results import ApplyResult, ExportResult, GgufResult
from sleb_cli.version import __version__
from sleb_plugins import Exporter, FileExporter, Pruning, UsageError
from sleb_plugins.gguf.file import read_gguf


def describe_pruning(subject: Subject, exporter: Exporter | FileExporter, source_file: Path | None) -> Pruning:
    """Return the description of the subject that exporters take.

    Raises:
        UsageError: no block is removed, or the format does not use the given source file.
    """
    architecture = subject.architecture
    if not subject.surgery.removals:
        raise UsageError("Nothing to export: no block is removed.", hint="Name a plan, or use --blocks.")
    if source_file is not None and not exporter.uses_source:
        raise UsageError(f"--source does not apply to --to {exporter.name}.", hint="Leave out --source.")
    source = architecture.source
    own_file = Path(source.id) if source.id.endswith(".gguf") else None
    return Pruning(
        # Other tools cannot resolve "demo" or our cache of converted GGUF files, so they get the folder.
        model=str(source.folder) if own_file or source.id == DEMO else source.id,
        revision=source.revision,
        dtype=dtype_name(architecture.config.dtype) if architecture.config.dtype else "float32",
        blocks=architecture.block_count,
        removals=subject.surgery.removals,
        source_file=source_file or own_file,
    )


def export_text(exporter: Exporter, pruning: Pruning) -> ExportResult:
    """Return the text that another tool reads, and the same as data."""
    return _result(exporter, text=exporter.render(pruning), document=exporter.document(pruning))


def export_files(
    exporter: FileExporter,
    subject: Subject,
    pruning: Pruning,
    request: ExportRequest,
    registry: Registry,
    notify: Notify,
) -> ExportResult:
    """Let the exporter write its files; raises what `apply_removals` and `prune_gguf` raise."""
    writer = _EngineWriter(subject, request, registry, notify)
    lines = exporter.export(pruning, request.output, writer)
    return _result(exporter, written=tuple(writer.written), lines=tuple(lines))


def _result(exporter: Exporter | FileExporter, **made: Any) -> ExportResult:
    return ExportResult(schema_version=1, sleb_version=__version__, kind="export", exporter=exporter.name, **made)


@dataclass(frozen=True)
class _EngineWriter:
    """What the engine offers to exporters: see `sleb_plugins.ArtifactWriter`."""

    subject: Subject
    request: ExportRequest
    registry: Registry
    notify: Notify
    written: list[ApplyResult | GgufResult] = field(default_factory=list)

    def write_checkpoint(self, output: Path | None, check: Callable[[Path], None] | None = None) -> Path:
        request = ApplyRequest(output=output, force=self.request.force)
        result = apply_removals(self.subject, request, self.notify, check)
        self.written.append(result)
        return Path(result.folder)

    def write_gguf(self, source: Path, output: Path | None) -> Path:
        file = read_gguf(source)
        if not self.request.any_model:
            require_same_kind_of_model(self.subject.architecture.record, file, self.notify)
        request = ApplyRequest(output=output, force=self.request.force)
        result = prune_gguf(file, self.subject.surgery.removals, request, self.registry, self.notify)
        self.written.append(result)
        return Path(result.file)
