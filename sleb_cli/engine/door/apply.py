"""Resolve a request of `sleb apply`: to the job that writes the checkpoint or GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.checks.places import are_the_same, require_new_place
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.checks.verbs import parse_shard_size
from sleb_cli.engine.cut.kinds import CUTS
from sleb_cli.engine.device import parse_dtype
from sleb_cli.engine.door.files import locate
from sleb_cli.engine.door.named_model import resolve_subject
from sleb_cli.engine.gguf.file import GgufFile
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.apply_gguf import default_file, prune_gguf, require_same_kind_of_model
from sleb_cli.engine.output.checkpoint import Output, apply_recovered, apply_removals, require_apart
from sleb_cli.engine.output.proof_placement import place_proof
from sleb_cli.engine.recovery.saved_state import clear_old
from sleb_cli.engine.surgery.gguf_surgery import plan_gguf_surgery
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import Plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import ApplyRequest, option_of
from sleb_cli.results import ApplyResult, GgufResult
from sleb_cli.texts.named import is_written
from sleb_plugins import DataError, PlanError, UnsupportedModelError, UsageError


def resolve_apply(
    request: ApplyRequest,
    named: NamedSubject,
    source: ModelSource | GgufFile,
    registry: Registry,
    notify: Notify,
) -> Callable[[], ApplyResult | GgufResult]:
    """Check that the checkpoint or GGUF file can be made; return the job that writes it."""
    quiet_libraries()
    if isinstance(source, GgufFile):
        if named.plan and named.plan.made_for.output:
            raise UnsupportedModelError(
                f"{named.plan.made_for.id} only reads, and sleb cannot prune such a GGUF file.",
                hint="Apply the plan to the model itself, and convert the checkpoint.",
            )
        _require_fitting(request, named, source, registry, notify)
        surgery = plan_gguf_surgery(source, named.removals, named.other_cuts)
        output = _output(request, request.output or default_file(surgery), source.path)
        return partial(prune_gguf, surgery, output, registry, notify)
    subject = resolve_subject(named, source, registry, notify)
    output = _checkpoint_output(request, subject)
    if subject.surgery.tokens is not None:
        _report_lost_tokens(request, subject, notify)
    if not request.recoveries:
        return partial(apply_removals, subject, output, notify)
    if not (subject.surgery.removals or "experts" in subject.surgery.other_cuts):
        raise UsageError(
            f"{option_of(request.recoveries[0])} refits the blocks around a gap, but no block is "
            "removed.",
            hint="Name a plan, or use --blocks 5,4,9.",
        )
    from sleb_cli.engine.door.recovery import resolve_recovery  # which imports datasets

    recovery = resolve_recovery(subject, request, output, notify)
    return partial(apply_recovered, subject, output, recovery, notify)


def _report_lost_tokens(request: ApplyRequest, subject: Subject, notify: Notify) -> None:
    """Tell which share of the named text, or else of the plan's, the removed tokens have."""
    from sleb_cli.engine.text.calibration import calibrate  # which imports datasets

    tokens = subject.surgery.tokens
    source = request.calibration
    if source is None and subject.plan:
        source = subject.plan.calibration.source
    # Text that the model writes itself says nothing about the user's languages.
    if tokens is None or source is None or any(map(is_written, parse_mixture(source))):
        return
    architecture = subject.architecture
    settings = resolve_calibration(
        architecture, source, request.samples, request.sequence_length, request.seed, request.chat
    )
    try:
        (text,) = calibrate([settings], load_tokenizer(architecture.source), lambda: None, notify)
    except DataError as error:
        if request.calibration:
            raise
        notify(Notice(f"The plan's text was not read: {error.message}"))
        return
    read = text.sequences
    ids = read if isinstance(read, Tensor) else read.ids[read.mask == 1]
    lost = 1 - float(torch.isin(ids, torch.tensor(tokens)).float().mean())
    notify(
        Notice(
            f"{lost:.1%} of the tokens in {text.record.title} go; what they spell will take more "
            f"tokens."
        )
    )


def _output(request: ApplyRequest, path: Path, gguf: Path | None) -> Output:
    clear_old(path.absolute().parent)
    require_new_place(path, gguf, force=request.force)
    return Output(
        path, request.force, verify=not request.no_verify, keep_failed=request.keep_failed
    )


def _checkpoint_output(request: ApplyRequest, subject: Subject) -> Output:
    architecture = subject.architecture
    if architecture.reading and architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, and sleb cannot prune such a model that only "
            f"reads.",
            hint="Prune the model that it was quantized from, and quantize the result.",
        )
    if request.dtype and architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its weights cannot be cast to "
            f"{request.dtype}.",
            hint="Leave out --dtype to keep them as they are.",
        )
    folder = request.output or Path(subject.surgery.name)
    require_apart(folder, architecture.source)
    output = _output(request, folder, None)
    dtype = parse_dtype(request.dtype, architecture.dtype) if request.dtype else None
    proof = place_proof(architecture, dtype, request.device_map, request.stream)
    return replace(output, dtype=dtype, shard_bytes=parse_shard_size(request), proof=proof)


def _require_fitting(
    request: ApplyRequest, named: NamedSubject, file: GgufFile, registry: Registry, notify: Notify
) -> None:
    """Check that the blocks or experts to remove belong to the model in this file."""
    if named.plan and request.source is None:
        resolve_subject(named, locate(named, notify), registry, notify)
    elif (named.removals or named.plan) and not request.any_model:
        if named.plan:
            require_same_kind_of_model(named.plan.made_for, file, notify)
            _require_as_many_parts(named.plan, file)
        elif not are_the_same(file.path, Path(named.model)):
            subject = resolve_subject(named, locate(named, notify), registry, notify)
            require_same_kind_of_model(subject.architecture.record, file, notify)


def _require_as_many_parts(plan: Plan, file: GgufFile) -> None:
    """Check that blocks in this file have as many parts as those that the plan takes from."""
    order = plan.order
    kind = CUTS.get(order.unit)
    if kind is None or kind.gguf_count is None:
        return
    count = file.count(kind.gguf_count) or 0
    if count != order.count:
        raise PlanError(
            f"{plan.made_for.id} has {order.count} {order.unit} in each block, but {file.path} has "
            f"{count}.",
            hint=f"Name a GGUF file of that model, from which no {order.unit} were removed.",
        )
