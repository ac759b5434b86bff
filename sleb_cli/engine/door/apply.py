"""The door of `sleb apply`: the request is checked and completed here, before the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.engine.cut.kinds import KINDS
from sleb_cli.engine.device import parse_dtype
from sleb_cli.engine.door.options import first_given, require_one_placement, require_what_they_need
from sleb_cli.engine.door.subject import first_removals, is_plan, read_named_plan, resolve_subject
from sleb_cli.engine.gguf.file import GgufFile, read_gguf
from sleb_cli.engine.output.apply import Output, default_folder, require_new_folder
from sleb_cli.engine.output.apply_gguf import are_the_same, default_file, require_new_gguf, require_same_kind_of_model
from sleb_cli.engine.output.proof import place_proof
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.unfinished import clear_old
from sleb_cli.engine.surgery.gguf_surgery import GgufSurgery, plan_gguf_surgery
from sleb_cli.engine.surgery.loading import load_tokenizer, quiet_libraries
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.mixture import parse_mixture
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.text.sources import is_written
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import Plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEFAULT_PLAN, DEFAULT_SHARD_SIZE, RECOVERIES, ApplyRequest
from sleb_cli.units import parse_bytes
from sleb_plugins import DataError, OutputError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from sleb_cli.engine.recovery.stage import RecoverySettings


def resolve_apply(
    request: ApplyRequest, registry: Registry, notify: Notify, group: ProcessGroup
) -> tuple[Subject | GgufSurgery, Output, RecoverySettings | None]:
    """Check and complete a request.

    Returns:
        what is written, a checkpoint or (`GgufSurgery`) a GGUF file; where; and how its blocks are recovered, if so.

    Raises:
        UsageError: options contradict each other, or the blocks or their number do not fit.
        PlanError: the plan is unreadable, or was made for another model.
        OutputError: the output exists, or cannot be written.
    """
    _require_coherent(request)
    quiet_libraries()
    named = request.subject or str(DEFAULT_PLAN)
    only_cuts_source = request.source is not None and request.blocks is not None and request.subject is None
    plan = read_named_plan(Path(named), request) if is_plan(named) and not only_cuts_source else None
    model = Path((request.model or plan.model.id) if plan else named)
    own_gguf = model if model.suffix == ".gguf" and not model.is_dir() else None
    others = {option: value for option in KINDS if (value := getattr(request, option))}
    if source := _gguf_to_cut(request, own_gguf):
        file = read_gguf(source)
        removals = _removals_from_gguf(request, plan, file, registry, notify)
        surgery = plan_gguf_surgery(file, removals, others)
        output = _output(request, default_file(surgery))
        require_new_gguf(output, source)
        return surgery, output, None
    subject = group.main_first(
        lambda: resolve_subject(request, registry, notify, plan=plan, needs_removals=True, others=others)
    )
    architecture = subject.architecture
    if request.dtype and architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its weights cannot be cast to {request.dtype}.",
            hint="Leave out --dtype to keep them as they are.",
        )
    output = _output(request, default_folder(subject), subject)
    require_new_folder(output.place, architecture.source, force=output.replace)
    if others and group.is_main:
        _say_what_is_lost(request, subject, notify)
    if not request.recoveries:
        return subject, output, None
    if not subject.surgery.removals:
        raise UsageError(
            f"{first_given(request, RECOVERIES)} refits the blocks around a gap, but no block is removed.",
            hint="Name a plan, or use --blocks 5,4,9.",
        )
    from sleb_cli.engine.door.recovery import resolve_recovery  # which imports datasets

    return subject, output, resolve_recovery(subject, request, output, group, notify)


def _say_what_is_lost(request: ApplyRequest, subject: Subject, notify: Notify) -> None:
    """Say what the named text, or else the plan's, loses with what goes besides blocks; the model's own tells nothing.

    Raises:
        DataError: the named text is missing or too short.
    """
    from sleb_cli.engine.text.calibration import calibrate  # which imports datasets

    plan = subject.plan
    source = request.calibration or (plan.calibration.source if plan else None)
    if source is None or any(map(is_written, parse_mixture(source))):
        return
    architecture = subject.architecture
    settings = resolve_calibration(
        architecture, source, request.samples, request.sequence_length, request.seed, request.chat
    )
    try:
        text = calibrate(settings, load_tokenizer(architecture.source), lambda: None, notify)
    except DataError as error:
        if request.calibration:
            raise
        notify(Notice(f"The plan's text was not read: {error.message}"))
        return
    for cut in subject.surgery.cuts:
        if told := cut.about_text(text.sequences, text.record.title):
            notify(Notice(told))


def _output(request: ApplyRequest, default: Path, subject: Subject | None = None) -> Output:
    """Return where the output goes; a checkpoint of `subject` is also cast, divided and proven as requested."""
    place, kept = request.output or default, request.keep_failed
    clear_old(place.absolute().parent)
    if kept is not None and kept.exists():
        raise OutputError(f"{kept} already exists.", hint="Choose another folder with --keep-failed.")
    output = Output(place, request.force, verify=not request.no_verify, keep_failed=kept)
    if subject is None:
        return output
    dtype = parse_dtype(request.dtype, subject.architecture.dtype) if request.dtype else None
    return replace(
        output,
        dtype=dtype,
        shard_bytes=parse_bytes(str(request.max_shard_size or DEFAULT_SHARD_SIZE), "--max-shard-size"),
        proof=place_proof(subject.architecture, dtype, request.device_map, request.stream),
    )


_NEEDS = {
    ("heal_minutes", "heal_tokens"): ("heal",),
    ("calibration",): (*RECOVERIES, "scripts"),
    ("samples", "sequence_length", "seed", "chat"): (*RECOVERIES, "calibration"),
    ("device",): RECOVERIES,
}
"""Options that do nothing without one of others."""


def _require_coherent(request: ApplyRequest) -> None:
    """Check the options that contradict each other, whatever the model.

    Raises:
        UsageError: some do.
    """
    require_one_placement(request)
    if request.heal and request.device_map is not None:
        raise UsageError(
            "--heal trains, so it needs all weights on its device, but --device-map spreads them out.",
            hint="Leave out --device-map and heal on a device with enough memory, or recover without training: "
            "--recover.",
        )
    if request.heal and request.stream:
        raise UsageError(
            "--heal trains the model, so all of it must be in memory, but --stream reads it block by block.",
            hint="Leave out --stream, or recover without training: --recover --stream.",
        )
    if request.heal_minutes is not None and request.heal_tokens is not None:
        raise UsageError("--heal-minutes and --heal-tokens cannot be combined.", hint="Use one of them.")
    if request.heal_minutes is not None and request.heal_minutes <= 0:
        raise UsageError(
            f"--heal-minutes must be above 0, not {request.heal_minutes:g}.", hint="For example: --heal-minutes 30."
        )
    if request.keep_failed is not None and request.no_verify:
        raise UsageError("--keep-failed requires the proof that --no-verify skips.", hint="Use one of them.")
    require_what_they_need(request, _NEEDS)


def _gguf_to_cut(request: ApplyRequest, own: Path | None) -> Path | None:
    """Return the GGUF file to remove blocks from; None if a checkpoint is to be written.

    A GGUF file is written from --source or a GGUF model (`own`), unless the output or another option asks for a
    checkpoint.

    Raises:
        UsageError: the output, the source and the other options contradict each other.
    """
    output, source = request.output, request.source
    recovery = first_given(request, RECOVERIES)
    for_checkpoints = first_given(request, ("device_map", "stream", "dtype", "max_shard_size"))
    named_file = output is not None and output.suffix == ".gguf"
    if source is None and not named_file:
        return None if output is not None or for_checkpoints or recovery else own
    if recovery:
        raise UsageError(
            f"{recovery} gives weights new values, which are written to a checkpoint, not to a GGUF file.",
            hint="Choose a folder with -o, without --source, and convert it with llama.cpp's convert_hf_to_gguf.py.",
        )
    if for_checkpoints:
        raise UsageError(
            f"{for_checkpoints} does not apply to a GGUF file, whose tensors are copied as they are.",
            hint="Write a checkpoint of the model instead: choose a folder with -o, without --source.",
        )
    if source is not None and request.model is not None:
        raise UsageError(
            "--model does not apply with --source: only the plan and the GGUF file are read.", hint="Leave it out."
        )
    if source is None and own is None:
        raise UsageError(
            f"{output} can only be made from a GGUF file of the model.",
            hint="Name that file with --source, or choose a folder with -o.",
        )
    return source or own


def _removals_from_gguf(
    request: ApplyRequest, plan: Plan | None, file: GgufFile, registry: Registry, notify: Notify
) -> tuple[int, ...]:
    """Return the blocks to remove, after checking that they belong to this file's model."""
    if plan is None and request.blocks is None and any(getattr(request, option) for option in KINDS):
        return ()
    if (plan is not None and request.source is None) or (plan is None and request.blocks is None):
        return resolve_subject(request, registry, notify, plan=plan, needs_removals=True).surgery.removals
    removals, model = (plan.removals, plan.model) if plan else ((), None)
    if request.blocks is not None:
        removals = first_removals(request.blocks, request.remove, "--blocks")
        if request.subject and not are_the_same(file.path, Path(request.subject)) and not request.any_model:
            model = resolve_subject(request, registry, notify).architecture.record
    if model and not request.any_model:
        require_same_kind_of_model(model, file, notify)
    return removals
