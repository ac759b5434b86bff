"""Remove blocks from a GGUF file, quantised or not, recover the others if requested, and prove the result."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch

from sleb_cli.atomic import new_file, require_new_file, require_space
from sleb_cli.engine.device import free_bytes
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor, gguf_size, read_gguf, write_gguf
from sleb_cli.engine.gguf.llama_cpp import holds_model_type
from sleb_cli.engine.gguf.surgery import GgufSurgery, block_count, plan_gguf_surgery
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.gguf import convert_gguf, transformers_knows
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.apply import kept_tensors
from sleb_cli.engine.output.proof import (
    NOTHING_WRITTEN,
    Planned,
    Reference,
    choose_proof_settings,
    kept_if_it_fails,
    prove,
    require_nothing_kept,
)
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.run import Recovered, recover
from sleb_cli.engine.recovery.unfinished import Unfinished, clear_old
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import first_of_plan, first_removals, is_plan, resolve_subject
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.third_party import disk_error, no_verdict_by_the_disk, translate_errors
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import WorkerFinished
from sleb_cli.records import ModelRecord, Proof
from sleb_cli.requests import DEFAULT_PLAN, ApplyRequest
from sleb_cli.results import GgufResult, RepackedTensors
from sleb_cli.units import format_bytes
from sleb_cli.version import __version__
from sleb_plugins import MachineError, ModelError, OutputError, PlanError, ProofError, UsageError


@dataclass(frozen=True)
class _LogitsProof:
    """The proof of a pruned file by transformers, or why there is none."""

    unproven: str | None = None
    proof: Proof | None = None


def gguf_source(request: ApplyRequest) -> Path | None:
    """Return the GGUF file to remove blocks from; None if a checkpoint is to be written.

    A GGUF file is written from --source or a GGUF model, unless the output or another option asks for a checkpoint.

    Raises:
        UsageError: the output, the source and the other options contradict each other.
    """
    output, checkpoint_options = request.output, _checkpoint_options(request)
    recovery = next((option for option in ("recover", "heal") if getattr(request, option)), None)
    named_file = output is not None and output.suffix == ".gguf"
    if request.source is None and not named_file:
        return None if output is not None or checkpoint_options else _gguf_model(request)
    if checkpoint_options:
        raise UsageError(
            f"{checkpoint_options[0]} does not apply to a GGUF file, whose tensors are copied as they are.",
            hint="Write a checkpoint of the model instead: choose a folder with -o, without --source.",
        )
    own = _gguf_model(request) if recovery else None
    is_own = own is not None and request.source is not None and _are_the_same(own, request.source)
    if recovery and request.source is not None and not is_own:
        raise UsageError(
            f"--{recovery} writes new values into the GGUF file of the model that it recovers, and --source names one "
            "of another model.",
            hint=f"Leave out --source, and name that file as the model: `sleb apply {request.source} --blocks … "
            f"--{recovery}`.",
        )
    if output is not None and not named_file:
        raise UsageError(
            f"--source writes a GGUF file, and {output} does not end in .gguf.", hint="Add .gguf to the name."
        )
    source = request.source or _gguf_model(request)
    if source is None:
        raise UsageError(
            f"{output} can only be made from a GGUF file of the model.",
            hint=f"Name that file {'as the model' if recovery else 'with --source'}, or choose a folder with -o.",
        )
    return source


def _are_the_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _checkpoint_options(request: ApplyRequest) -> list[str]:
    """Return the given options that only apply to a checkpoint."""
    given = {
        "--device-map": request.device_map is not None,
        "--stream": request.stream is not None,
        "--dtype": request.dtype is not None,
        "--push": request.push is not None,
        "--max-shard-size": request.max_shard_size is not None,
    }
    return [option for option, is_given in given.items() if is_given]


def _gguf_model(request: ApplyRequest) -> Path | None:
    """Return the model, if it is a GGUF file."""
    named = request.subject or str(DEFAULT_PLAN)
    if is_plan(named):
        if request.blocks is not None:  # refused where the plan is read
            return None
        named = request.model or read_plan(Path(named)).model.id
    return Path(named) if named.endswith(".gguf") and not Path(named).is_dir() else None


def apply_to_gguf(
    request: ApplyRequest, source: Path, registry: Registry, notify: Notify, group: ProcessGroup | None = None
) -> GgufResult:
    """Remove from `source` the blocks that the request names, in a plan or as a list, and recover it if requested.

    Raises:
        PlanError: the plan is unreadable, or was made for another model.
        UsageError: the blocks or their number do not fit.
        WorkerFinished: this process only helped to recover; the main process writes the file.
    """
    quiet_libraries()
    file, group = read_gguf(source), group or ProcessGroup()
    if not (request.recover or request.heal):
        return prune_gguf(file, _removals(request, file, registry, notify), request, registry, notify)
    subject = group.one_first(lambda: resolve_subject(request, registry, notify, needs_removals=True))
    output = _place(request, file, subject.surgery.removals)
    state = Unfinished(output)
    clear_old(output.absolute().parent)
    state.require(resume=request.resume, force=request.force)

    def run() -> Recovered:
        return recover(subject, request, None, state, group, notify, gguf=file)

    if not group.is_main:
        run()
        raise WorkerFinished
    request = replace(request, force=state.may_replace(resume=request.resume, force=request.force))
    with state.told_on_failure(notify):
        result = prune_gguf(file, subject.surgery.removals, request, registry, notify, run)
    state.delete()
    return result


def prune_gguf(
    file: GgufFile,
    removals: tuple[int, ...],
    request: ApplyRequest,
    registry: Registry,
    notify: Notify,
    recovering: Callable[[], Recovered] | None = None,
) -> GgufResult:
    """Write the pruned file, complete and checked, or write nothing; `recovering` returns new values for it.

    Raises:
        UnsupportedModelError: these blocks cannot be removed from this architecture.
        ProofError: the file does not compute the same as the source with these blocks skipped.
        OutputError: the file exists, cannot be written, or is the source itself.
    """
    surgery = plan_gguf_surgery(file, removals)
    pruned, path = surgery.pruned(), _place(request, file, removals)
    _require_place(path, pruned, force=request.force)
    require_nothing_kept(request.keep_failed)
    logits_proof = _LogitsProof("--no-verify")
    watch = Watch()
    watch.add(file.path)
    with new_file(path, replace=request.force) as aside, watch.unchanged():
        if read_gguf(file.path) != file:
            raise ModelError(f"{file.path} changed while it was read.", hint="Run the command again.")
        # The place is claimed before hours of recovery.
        recovered = recovering() if recovering else None
        if recovered:
            pruned = surgery.pruned(recovered.packed)
            require_space(path, gguf_size(pruned))
        _write(pruned, aside, notify)
        if not request.no_verify:
            with kept_if_it_fails(aside, request.keep_failed):
                logits_proof = _prove(surgery, pruned, aside, recovered, registry, notify)
    return GgufResult(
        schema_version=1,
        sleb_version=__version__,
        kind="gguf",
        source=str(file.path.absolute()),
        architecture=file.architecture,
        removals=surgery.removals,
        file=str(path),
        blocks=block_count(file) - len(removals),
        file_bytes=gguf_size(pruned),
        recovery=recovered.record if recovered else None,
        repacked=_repacked(file, recovered.packed.values()) if recovered else (),
        verified=not request.no_verify,
        proof=logits_proof.proof,
        unproven=logits_proof.unproven,
    )


def _place(request: ApplyRequest, file: GgufFile, removals: tuple[int, ...]) -> Path:
    """Return where the pruned file goes."""
    return request.output or Path(f"{file.path.stem}-sleb-{block_count(file) - len(removals)}-blocks.gguf")


def _repacked(file: GgufFile, packed: Iterable[GgufTensor]) -> tuple[RepackedTensors, ...]:
    """Return how many tensors with new values there are, and their bytes, for each type before and now."""
    before = {tensor.name: tensor.type for tensor in file.tensors}
    sizes: dict[tuple[int, int], list[int]] = {}
    for tensor in packed:
        sizes.setdefault((before[tensor.name], tensor.type), []).append(tensor.size)
    return tuple(
        RepackedTensors(before=_type_name(was), type=_type_name(now), tensors=len(of_type), bytes=sum(of_type))
        for (was, now), of_type in sizes.items()
    )


def _type_name(type_: int) -> str:
    return str(gguf.GGMLQuantizationType(type_).name)


def _removals(request: ApplyRequest, file: GgufFile, registry: Registry, notify: Notify) -> tuple[int, ...]:
    """Return the blocks to remove, after checking that they belong to this file's model."""
    if request.source is not None and request.model is not None:
        raise UsageError(
            "--model does not apply with --source: only the plan and the GGUF file are read.", hint="Leave it out."
        )
    named = request.subject
    if request.blocks is None or (named is not None and is_plan(named)):
        return _planned_removals(request, file, registry, notify)
    is_other = named is not None and not _are_the_same(file.path, Path(named))
    if is_other and not request.any_model:
        require_same_kind_of_model(resolve_subject(request, registry, notify).architecture.record, file, notify)
    return first_removals(request.blocks, request.remove, "--blocks")


def _planned_removals(request: ApplyRequest, file: GgufFile, registry: Registry, notify: Notify) -> tuple[int, ...]:
    path = Path(request.subject or DEFAULT_PLAN)
    if request.source is None or not is_plan(str(path)) or request.blocks is not None:
        return resolve_subject(request, registry, notify, needs_removals=True).surgery.removals
    plan = read_plan(path)
    if not request.any_model:
        require_same_kind_of_model(plan.model, file, notify)
    return first_of_plan(plan, request.remove, path).removals


def require_same_kind_of_model(model: ModelRecord, file: GgufFile, notify: Notify) -> None:
    """Check that a GGUF file may hold this model, by its type and number of blocks.

    Raises:
        PlanError: it holds another model.
    """
    count = block_count(file)
    fits = holds_model_type(file.architecture, model.model_type)
    if fits is False or model.blocks != count:
        raise PlanError(
            f"The blocks are those of {model.id} ({model.model_type}, {model.blocks} blocks), but {file.path} holds "
            f"another model ({file.architecture}, {count} blocks).",
            hint="Name a GGUF file of that model, or remove these blocks from this one with --any-model.",
        )
    if fits is None:
        notify(
            Notice(
                f"sleb does not know if GGUF files of {model.model_type} have the architecture {file.architecture}; "
                "the number of blocks matches."
            )
        )


def _require_place(path: Path, pruned: GgufFile, *, force: bool) -> None:
    if _are_the_same(path, pruned.path):
        raise OutputError(f"{path} is the source file itself.", hint="Choose another name with -o.")
    require_new_file(path, force=force)
    require_space(path, gguf_size(pruned))


def _write(pruned: GgufFile, aside: Path, notify: Notify) -> None:
    with task(notify, "Writing weights", sum(tensor.size for tensor in pruned.tensors), "B") as advance:
        write_gguf(pruned, aside, advance)


def _prove(
    surgery: GgufSurgery,
    pruned: GgufFile,
    aside: Path,
    recovered: Recovered | None,
    registry: Registry,
    notify: Notify,
) -> _LogitsProof:
    """Prove the file.

    Raises:
        ProofError: it differs from what it should be.
        OSError: the disk failed, which is no verdict about the file.
    """
    with no_verdict_by_the_disk(ProofError):
        _require_as_planned(pruned, aside)
        return _prove_with_transformers(surgery, aside, recovered, registry, notify)


def _require_as_planned(pruned: GgufFile, aside: Path) -> None:
    """Compare the file's metadata and every byte of every tensor with the source, or with the new values.

    The gguf package reads the tensors of both files, so by none of the code that wrote.

    Raises:
        ProofError: anything differs.
    """
    with translate_errors(lambda words: _failed(f"the gguf package cannot read it: {words}")):
        found, source = gguf.GGUFReader(aside).tensors, gguf.GGUFReader(pruned.path).tensors
    try:
        written = read_gguf(aside)
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    if (what := _differing_entry(written, pruned)) is not None:
        raise _failed(f"its metadata differ from the expected ones: {what}")
    if len(found) != len(pruned.tensors):
        raise _failed(f"it holds {len(found)} tensors, not {len(pruned.tensors)}")
    there = {(tensor.data_offset, tensor.n_bytes): tensor for tensor in source}
    for tensor, expected in zip(found, pruned.tensors, strict=True):
        original = there.get((expected.start, expected.size))
        values = _bytes_of(original) if original is not None and expected.values is None else expected.values
        if not _is_the_same(tensor, expected) or values is None or _bytes_of(tensor) != values:
            raise _failed(f"the tensor {tensor.name} differs from the expected {expected.name}")
    if (size := aside.stat().st_size) != gguf_size(pruned):
        raise _failed(f"it has {size} bytes, not {gguf_size(pruned)}")


def _differing_entry(found: GgufFile, expected: GgufFile) -> str | None:
    """Return what differs first in the metadata, or None."""
    if (found.version, found.order) != (expected.version, expected.order):
        return f"version {found.version}, not {expected.version}, or another byte order"
    entries = {entry.key: entry for entry in found.entries}
    for entry in expected.entries:
        if (there := entries.pop(entry.key, None)) != entry:
            return f"{entry.key} is {'missing' if there is None else 'another'}"
    if entries:
        return f"{next(iter(entries))} is unexpected"
    return None if found.entries == expected.entries else "their order is another"


def _is_the_same(found: gguf.ReaderTensor, expected: GgufTensor) -> bool:
    return (found.name, int(found.tensor_type), tuple(found.shape)) == (expected.name, expected.type, expected.shape)


def _bytes_of(tensor: gguf.ReaderTensor) -> memoryview:
    return memoryview(tensor.data.reshape(-1).view(np.uint8))


def _prove_with_transformers(
    surgery: GgufSurgery, aside: Path, recovered: Recovered | None, registry: Registry, notify: Notify
) -> _LogitsProof:
    """Compare the pruned file with the source without these blocks, both as transformers reads them.

    A recovered file is compared with the recovered model in memory.
    """
    file = surgery.file
    if reason := _why_transformers_cannot(file, aside):
        return _LogitsProof(reason)
    try:
        architecture = read_architecture(locate_model(str(file.path), notify), registry, notify)
        hf_surgery = plan_surgery(architecture, surgery.removals)
    except (ModelError, MachineError, UsageError) as error:
        if disk_error(error):
            raise
        return _LogitsProof(error.message.rstrip("."))
    if architecture.block_count != block_count(file):
        return _LogitsProof(f"transformers reads {architecture.block_count} blocks in it, not {block_count(file)}")
    folder = aside.parent / "checkpoint"
    try:
        convert_gguf(aside, folder, notify)
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    planned = Planned(kept_tensors(hf_surgery, values=recovered.tensors if recovered else None))
    reference = Reference(hf_surgery, recovered.parameters if recovered else None)
    return _LogitsProof(None, prove(reference, folder, planned, choose_proof_settings(architecture, None), notify))


def _why_transformers_cannot(file: GgufFile, aside: Path) -> str | None:
    """Return why transformers cannot read this file on this machine, if that is known beforehand."""
    if not transformers_knows(file.architecture):
        return f"transformers does not read GGUF files of the architecture {file.architecture}"
    parameters = sum(math.prod(tensor.shape) for tensor in file.tensors)
    # It unpacks all weights to float32 before casting them, and they are then written twice, dense and pruned.
    memory, disk = 8 * parameters, 8 * parameters
    available = free_bytes(torch.device("cpu"))
    if available < memory:
        return f"transformers needs {format_bytes(memory)} of memory, and only {format_bytes(available)} are free"
    free = shutil.disk_usage(aside.parent).free
    if free < disk:
        return f"transformers needs {format_bytes(disk)} of disk space, and only {format_bytes(free)} are free"
    return None


def _failed(what: str) -> ProofError:
    return ProofError(
        f"The pruned GGUF file failed its proof: {what}.",
        hint=NOTHING_WRITTEN,
    )
