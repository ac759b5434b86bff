"""`sleb apply`: everything that is asked for is resolved and checked here, once, before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sleb_cli.engine.device import parse_dtype
from sleb_cli.engine.door.machine import require_one_placement
from sleb_cli.engine.door.subject import first_of_plan, first_removals, is_plan, resolve_subject
from sleb_cli.engine.gguf.file import GgufFile, read_gguf
from sleb_cli.engine.output.apply import apply_removals, default_folder, require_new_folder
from sleb_cli.engine.output.apply_gguf import are_the_same, default_place, prune_gguf, require_same_kind_of_model
from sleb_cli.engine.output.delivery import Delivery
from sleb_cli.engine.output.proof import ProofSettings, choose_proof_settings
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.unfinished import Unfinished, clear_old
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify
from sleb_cli.plan import read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import WorkerFinished
from sleb_cli.requests import DEFAULT_PLAN, DEFAULT_SHARD_SIZE, ApplyRequest, DeviceMap
from sleb_cli.results import ApplyResult, GgufResult
from sleb_cli.units import parse_bytes
from sleb_plugins import OutputError, UnsupportedModelError, UsageError


@dataclass(frozen=True)
class ToCheckpoint:
    """A checkpoint after every check: for its fields, see `apply_removals`."""

    subject: Subject
    to: Delivery
    dtype: torch.dtype | None
    shard_bytes: int
    settings: ProofSettings


@dataclass(frozen=True)
class ToGguf:
    """A GGUF file after every check: for its fields, see `prune_gguf`."""

    file: GgufFile
    removals: tuple[int, ...]
    to: Delivery


def apply_request(
    request: ApplyRequest, registry: Registry, notify: Notify, group: ProcessGroup
) -> ApplyResult | GgufResult:
    """Write the checkpoint or GGUF file that a request asks for; raises like `resolve_apply`.

    Raises:
        ProofError: it does not compute what it should.
    """
    asked = resolve_apply(request, registry, notify, group)
    if isinstance(asked, ToGguf):
        return prune_gguf(asked.file, asked.removals, asked.to, registry, notify)
    return apply_removals(
        asked.subject, asked.to, notify, dtype=asked.dtype, shard_bytes=asked.shard_bytes, settings=asked.settings
    )


def resolve_apply(
    request: ApplyRequest, registry: Registry, notify: Notify, group: ProcessGroup
) -> ToCheckpoint | ToGguf:
    """Check and complete a request; the processes of a group recover together.

    Raises:
        UsageError: options contradict each other, or the blocks or their number do not fit.
        PlanError: the plan is unreadable, or was made for another model.
        OutputError: the output exists, or cannot be written.
        WorkerFinished: this process only helped to recover; the main process writes.
    """
    _require_coherent(request)
    quiet_libraries()
    source = _gguf_source(request)
    file = read_gguf(source) if source else None
    if file:
        removals = _removals(request, file, registry, notify)
        return ToGguf(file, removals, _delivery(request, default_place(file, removals)))
    subject = group.one_first(lambda: resolve_subject(request, registry, notify, needs_removals=True))
    return _to_checkpoint(subject, request, group, notify)


def _to_checkpoint(subject: Subject, request: ApplyRequest, group: ProcessGroup, notify: Notify) -> ToCheckpoint:
    architecture = subject.architecture
    shard_size = DEFAULT_SHARD_SIZE if request.max_shard_size is None else request.max_shard_size
    shard_bytes = parse_bytes(str(shard_size), "--max-shard-size")
    if request.dtype and architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its weights cannot be cast to {request.dtype}.",
            hint="Leave out --dtype to keep them as they are.",
        )
    dtype = parse_dtype(request.dtype, architecture.dtype) if request.dtype else None
    settings = choose_proof_settings(architecture, dtype, request.device_map, request.stream)
    to = _delivery(request, default_folder(subject))
    require_new_folder(to.place, architecture.source, force=to.replace)
    if request.recover or request.heal:
        to = _recovering(to, subject, request, dtype, request.device_map, group, notify)
    return ToCheckpoint(subject, to, dtype, shard_bytes, settings)


def _delivery(request: ApplyRequest, default: Path) -> Delivery:
    place, kept = request.output or default, request.keep_failed
    clear_old(place.absolute().parent)
    if kept is not None and kept.exists():
        raise OutputError(f"{kept} already exists.", hint="Choose another folder with --keep-failed.")
    # What is healed may have been killed just after it wrote its output.
    may_replace = request.force or (request.resume and Unfinished(place).healing.exists())
    return Delivery(place, may_replace, verify=not request.no_verify, keep_failed=kept)


def _recovering(
    to: Delivery,
    subject: Subject,
    request: ApplyRequest,
    dtype: torch.dtype | None,
    device_map: DeviceMap | None,
    group: ProcessGroup,
    notify: Notify,
) -> Delivery:
    """Return a delivery that recovers; all but the main process only do that.

    Raises:
        WorkerFinished: this is another process.
    """
    from sleb_cli.engine.recovery.settings import resolve_recovery

    state = Unfinished(to.place)
    state.require(resume=request.resume, force=request.force)
    recovery = resolve_recovery(subject, request, dtype, device_map, state, group, notify)
    if not group.is_main:
        recovery.run()
        raise WorkerFinished
    return replace(to, recovery=recovery)


_NEEDS = {
    ("heal_minutes", "heal_tokens", "resume"): ("heal",),
    ("calibration", "samples", "sequence_length", "seed", "chat", "device"): ("recover", "heal"),
}
"""Options that do nothing without one of others."""


def _require_coherent(request: ApplyRequest) -> None:
    require_one_placement(request)
    if request.device_map is not None and request.heal:
        raise UsageError(
            "--heal trains, so it needs all weights on its device, but --device-map spreads them out.",
            hint="Leave out --device-map and heal on a device with enough memory, or recover without training: "
            "--recover.",
        )
    if request.keep_failed is not None and request.no_verify:
        raise UsageError("--keep-failed requires the proof that --no-verify skips.", hint="Use one of them.")
    for names, needed in _NEEDS.items():
        if (given := _first_given(request, names)) and not _first_given(request, needed):
            options = " or ".join(f"--{name}" for name in needed)
            raise UsageError(f"{given} requires {options}.", hint=f"Use both, or leave out {given}.")


def _first_given(request: ApplyRequest, names: Sequence[str]) -> str | None:
    """Return the first of these options that the user gave."""
    unset = ApplyRequest()
    given = (name for name in names if getattr(request, name) != getattr(unset, name))
    return next((f"--{name.replace('_', '-')}" for name in given), None)


def _gguf_source(request: ApplyRequest) -> Path | None:
    """Return the GGUF file to remove blocks from; None if a checkpoint is to be written.

    A GGUF file is written from --source or a GGUF model, unless the output or another option asks for a checkpoint.

    Raises:
        UsageError: the output, the source and the other options contradict each other.
    """
    output, source = request.output, request.source
    recovery = _first_given(request, ("recover", "heal"))
    for_checkpoints = _first_given(request, ("device_map", "stream", "dtype", "max_shard_size"))
    named_file = output is not None and output.suffix == ".gguf"
    if source is None and not named_file:
        return None if output is not None or for_checkpoints or recovery else _gguf_model(request)
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
    if output is not None and not named_file:
        raise UsageError(
            f"--source writes a GGUF file, but {output} does not end in .gguf.", hint="Add .gguf to the name."
        )
    if source is None and (source := _gguf_model(request)) is None:
        raise UsageError(
            f"{output} can only be made from a GGUF file of the model.",
            hint="Name that file with --source, or choose a folder with -o.",
        )
    return source


def _gguf_model(request: ApplyRequest) -> Path | None:
    """Return the model, if it is a GGUF file."""
    named = request.subject or str(DEFAULT_PLAN)
    if is_plan(named):
        if request.blocks is not None:  # refused where the plan is read
            return None
        named = request.model or read_plan(Path(named)).model.id
    return Path(named) if named.endswith(".gguf") and not Path(named).is_dir() else None


def _removals(request: ApplyRequest, file: GgufFile, registry: Registry, notify: Notify) -> tuple[int, ...]:
    """Return the blocks to remove, after checking that they belong to this file's model."""
    if request.source is not None and request.model is not None:
        raise UsageError(
            "--model does not apply with --source: only the plan and the GGUF file are read.", hint="Leave it out."
        )
    named, model = request.subject or str(DEFAULT_PLAN), None
    if request.blocks is not None and not (request.subject and is_plan(named)):
        removals = first_removals(request.blocks, request.remove, "--blocks")
        if request.subject and not are_the_same(file.path, Path(named)) and not request.any_model:
            model = resolve_subject(request, registry, notify).architecture.record
    elif request.source is None or request.blocks is not None or not is_plan(named):
        return resolve_subject(request, registry, notify, needs_removals=True).surgery.removals
    else:
        plan = read_plan(Path(named))
        removals, model = first_of_plan(plan, request.remove, Path(named)).removals, plan.model
    if model and not request.any_model:
        require_same_kind_of_model(model, file, notify)
    return removals
