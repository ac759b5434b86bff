"""Resolve a request of `sleb export`: to the description that an export format takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_cli.atomic import require_new_file
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.measured import read_measurements
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEMO, ExportRequest, sibling
from sleb_cli.results import EvalResult
from sleb_plugins import Exporter, Pruning, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from sleb_cli.engine.surgery.subject import Subject


def resolve_export(
    request: ExportRequest,
    asked: Sequence[NamedSubject],
    exporter: Exporter,
    source: ModelSource | None,
    registry: Registry,
    notify: Notify,
) -> tuple[Pruning, Path | None]:
    """Describe the model or the plans for the format.

    Returns:
        the description, and the output file, or None to print.
    """
    named = asked[0]
    subject = None
    if source:
        # These import torch.
        from sleb_cli.engine.door.named_model import needs_language_head, resolve_subject

        subject = resolve_subject(named, source, registry, notify)
        if subject.architecture.reading and exporter.only_counts:
            raise UnsupportedModelError(
                needs_language_head(exporter.name, subject.architecture),
                hint="Write the checkpoint with `sleb apply`.",
            )
    pruning = _pruning(request, named, subject, notify)
    # The format reads the metadata of a GGUF file itself.
    reads_gguf = exporter.uses_source and pruning.source_file
    if subject and exporter.only_counts and not reads_gguf:
        _require_only_count_changes(subject, exporter, pruning.model)
    if not (pruning.removals or named.other_cuts or pruning.evaluation):
        raise UsageError(
            "Nothing to export: no block is removed.", hint="Name a plan, or use --blocks."
        )
    output = request.output
    if output is None and exporter.ending:
        output = sibling(pruning.plan_file or Path(Path(pruning.model).name), exporter.ending)
        require_new_file(output, force=request.force)
    more = tuple(_pruning(request, other, None, notify) for other in asked[1:])
    return replace(pruning, others=more, output=request.output), output


def _require_only_count_changes(subject: Subject, exporter: Exporter, model: str) -> None:
    """Check that renumbering the blocks makes no setting wrong: the other tool corrects none."""
    from sleb_cli.engine.cut.blocks.block_cut import BlockCut  # which imports torch

    if others := BlockCut(subject.architecture, subject.surgery.removals).settings_of_blocks:
        raise UnsupportedModelError(
            f"{exporter.name} would renumber the blocks of {model} but not correct "
            f"{', '.join(others)}.",
            hint="Use `sleb apply`, which corrects it.",
        )


def _comparison(result: EvalResult, file: Path | None) -> Pruning:
    """Describe what was measured of two models."""
    model = result.model
    return Pruning(
        model=model.id,
        revision=model.revision,
        dtype=model.dtype or result.dtype,
        blocks=model.blocks,
        removals=(),
        plan_file=file,
        evaluation=result.published().to_data(),
    )


def _pruning(
    request: ExportRequest, named: NamedSubject, subject: Subject | None, notify: Notify
) -> Pruning:
    """Describe a model and its removals, with the plan and its results.

    No local folder is named. Without a subject, the model may be on another machine: then the plan
    says it all.
    """
    plan_fields: dict[str, Any] = {}
    plan = named.plan
    if named.comparison:
        return _comparison(named.comparison, named.file)
    if plan and named.file:
        model = plan.model
        dtype = plan.search.dtype
        evaluation, benchmark = read_measurements(named.file, plan, notify)
        plan_fields = {
            "plan_file": named.file,
            "plan": plan.published().to_data(),
            "evaluation": evaluation and evaluation.to_data(),
            "benchmark": benchmark and benchmark.to_data(),
        }
    source_file = request.source
    folder = None
    if subject:
        model = subject.architecture.record
        dtype = "float32"
        own_file = model.id.endswith(".gguf")
        # Other tools cannot resolve "demo" or our cache of converted GGUF files.
        if own_file or model.id == DEMO:
            folder = str(subject.architecture.source.folder)
        if own_file:
            source_file = source_file or Path(model.id)
    return Pruning(
        model=folder or model.id,
        revision=model.revision,
        dtype=model.dtype or dtype,
        blocks=model.blocks,
        removals=named.removals,
        source_file=source_file,
        **plan_fields,
    )
