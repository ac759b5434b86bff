"""`sleb export`: the removals as another tool writes them, or the files that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sleb_cli import __version__
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.output.apply import apply_removals
from sleb_cli.engine.output.apply_gguf import prune_gguf, require_same_kind_of_model
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.results import ApplyResult, ExportResult, GgufResult
from sleb_plugins import Exporter, FileExporter, Pruning, UsageError
from sleb_plugins.gguf.file import read_gguf

MAX_SHARD_SIZE = "5GB"


def describe_pruning(subject: Subject, exporter: Exporter | FileExporter, source_file: Path | None) -> Pruning:
    """Describe the subject as exporters take it.

    Raises:
        UsageError: no block is to go, or a source file was named that the format does not use.
    """
    architecture = subject.architecture
    if not subject.surgery.removals:
        raise UsageError("There is nothing to export: no block is removed.", hint="Name a plan, or give --blocks.")
    if source_file is not None and not exporter.uses_source:
        raise UsageError(f"--source does not go with --to {exporter.name}.", hint="Leave it out.")
    source = architecture.source
    own_file = Path(source.id) if source.id.endswith(".gguf") else None
    return Pruning(
        # Other tools know neither "demo" nor our cache of converted GGUF files: they get the folder.
        model=str(source.folder) if own_file or source.id == DEMO else source.id,
        revision=source.revision,
        dtype=dtype_name(architecture.config.dtype) if architecture.config.dtype else "float32",
        blocks=architecture.block_count,
        removals=subject.surgery.removals,
        source_file=source_file or own_file,
    )


def export_files(
    exporter: FileExporter,
    subject: Subject,
    pruning: Pruning,
    output: Path | None,
    registry: Registry,
    notify: Notify,
    *,
    force: bool,
    any_model: bool,
) -> ExportResult:
    """Let the exporter write, and give what it wrote; raises as what it makes use of."""
    writer = _EngineWriter(subject, registry, notify, force, any_model)
    lines = exporter.export(pruning, output, writer)
    return ExportResult(
        schema_version=1,
        sleb_version=__version__,
        kind="export",
        exporter=exporter.name,
        written=tuple(writer.written),
        lines=tuple(lines),
    )


@dataclass(frozen=True)
class _EngineWriter:
    """What exporters may ask of the engine, as `sleb_plugins.ArtifactWriter` says it."""

    subject: Subject
    registry: Registry
    notify: Notify
    force: bool
    any_model: bool
    written: list[ApplyResult | GgufResult] = field(default_factory=list)

    def write_checkpoint(self, output: Path | None, check: Callable[[Path], None] | None = None) -> Path:
        result = apply_removals(
            self.subject, output, self.notify, max_shard_size=MAX_SHARD_SIZE, force=self.force, check=check
        )
        self.written.append(result)
        return Path(result.folder)

    def write_gguf(self, source: Path, output: Path | None) -> Path:
        file = read_gguf(source)
        if not self.any_model:
            require_same_kind_of_model(self.subject.architecture.record, file, self.notify)
        result = prune_gguf(file, self.subject.surgery.removals, output, self.registry, self.notify, force=self.force)
        self.written.append(result)
        return Path(result.file)
