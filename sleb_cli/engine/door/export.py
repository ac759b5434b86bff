"""The door of `sleb export`: a request becomes a format, and what it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleb_cli.asked.subjects import NamedSubject
from sleb_cli.asked.verbs import AskedExport
from sleb_cli.atomic import require_new_file
from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.door.subject import resolve_subject
from sleb_cli.engine.output.measured import measured_of_plan
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plan import Plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEMO, ExportRequest, sibling
from sleb_plugins import Pruning, UnsupportedModelError, UsageError


def resolve_export(
    request: ExportRequest, asked: AskedExport, registry: Registry, notify: Notify
) -> tuple[Pruning, Path | None]:
    """Find what the format describes (a model and its removals, or a plan alone), and where the text goes.

    It is printed if that is None.

    Raises:
        PlanError: the plan was made for another model.
        UnsupportedModelError: the other tool would leave some settings of the model wrong.
        UsageError: no block is removed.
        OutputError: the output exists.
    """
    exporter = asked.exporter
    if isinstance(asked.subject, NamedSubject):
        subject = resolve_subject(asked.subject, registry, notify)
        pruning = _pruning_of_model(subject, request, notify)
        reads_gguf = exporter.uses_source and pruning.source_file  # whose metadata the format reads itself
        if exporter.only_counts and not reads_gguf and (others := _settings_of_blocks(subject)):
            raise UnsupportedModelError(
                f"{exporter.name} would renumber the blocks of {pruning.model} but not correct {', '.join(others)}.",
                hint="Use `sleb apply`, which corrects it.",
            )
    else:
        pruning = _pruning_of_plan(*asked.subject, request, notify)
    if not pruning.removals:
        raise UsageError("Nothing to export: no block is removed.", hint="Name a plan, or use --blocks.")
    output = request.output
    if output is None and exporter.ending:
        output = sibling(pruning.plan_file or Path(Path(pruning.model).name), exporter.ending)
        require_new_file(output, force=request.force)
    return pruning, output


def _settings_of_blocks(subject: Subject) -> list[str]:
    return BlockCut(subject.architecture, subject.surgery.removals).settings_of_blocks


def _own_file(subject: Subject) -> Path | None:
    """Return the model, if it is a GGUF file."""
    model = subject.architecture.source.id
    return Path(model) if model.endswith(".gguf") else None


def _pruning_of_model(subject: Subject, request: ExportRequest, notify: Notify) -> Pruning:
    architecture, own_file = subject.architecture, _own_file(subject)
    source = architecture.source
    return Pruning(
        # Other tools cannot resolve "demo" or our cache of converted GGUF files, so they get the folder.
        model=str(source.folder) if own_file or source.id == DEMO else source.id,
        revision=source.revision,
        dtype=dtype_name(architecture.dtype) if architecture.dtype else "float32",
        blocks=architecture.block_count,
        removals=subject.surgery.removals,
        source_file=request.source or own_file,
        **(_measured(subject.file, subject.plan, notify) if subject.file and subject.plan else {}),
    )


def _pruning_of_plan(file: Path, plan: Plan, request: ExportRequest, notify: Notify) -> Pruning:
    """Describe a plan from its files alone: the model may be on another machine."""
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
    evaluation, benchmark = measured_of_plan(file, plan, notify)
    return {
        "plan_file": file,
        "plan": plan.published().to_data(),
        "evaluation": evaluation and evaluation.to_data(),
        "benchmark": benchmark and benchmark.to_data(),
    }
