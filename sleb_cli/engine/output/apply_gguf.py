"""`sleb apply --to-gguf`: remove blocks from a GGUF file, whatever it is quantised to, and prove the result."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from sleb_cli import __version__
from sleb_cli.atomic import new_file, require_new_file, require_space
from sleb_cli.engine.device import free_bytes
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.gguf import convert_gguf, transformers_knows
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.apply import kept_tensors
from sleb_cli.engine.output.proof import Reference, proof_terms, prove
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import DEFAULT_PLAN, SubjectRequest, first_of_plan, first_removals, is_plan
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.plan import read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord, Proof
from sleb_cli.results import GgufResult
from sleb_plugins import MachineError, ModelError, OutputError, PlanError, ProofError, UsageError
from sleb_plugins.gguf.file import GgufFile, Tensor, gguf_size, read_gguf, write_gguf
from sleb_plugins.gguf.llama_cpp import may_be
from sleb_plugins.gguf.surgery import GgufSurgery, block_count, plan_gguf_surgery


@dataclass(frozen=True)
class _Outcome:
    """What transformers said of a pruned file, or why it was not asked."""

    unproven: str | None = None
    proof: Proof | None = None


def apply_to_gguf(
    request: SubjectRequest,
    source: Path,
    output: Path | None,
    registry: Registry,
    notify: Notify,
    *,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
) -> GgufResult:
    """Remove from `source` the blocks that the request names, by a plan or one by one; the plan's model is not read.

    Raises:
        PlanError: the plan is unreadable, or was made for a model of another type or number of blocks.
        UsageError: the blocks or their number do not fit, or an option speaks of what is not read here.
    """
    quiet_libraries()
    if request.model or request.revision or request.trust_remote_code or dtype:
        raise UsageError(
            "--model, --revision, --trust-remote-code and --dtype do not go with --to-gguf.",
            hint="Nothing is read but the plan and the GGUF file, whose weights stay as they are: leave them out.",
        )
    file = read_gguf(source)
    removals = _removals(request, file, notify)
    return prune_gguf(file, removals, output, registry, notify, force=force, verify=verify)


def prune_gguf(
    file: GgufFile,
    removals: tuple[int, ...],
    output: Path | None,
    registry: Registry,
    notify: Notify,
    *,
    force: bool = False,
    verify: bool = True,
) -> GgufResult:
    """Write the pruned file to `output`, whole and checked, or write nothing.

    Raises:
        UnsupportedModelError: the architecture does not let these blocks go.
        ProofError: the file does not do what the source with its blocks switched off does.
        OutputError: the file exists, cannot be written, or is the source itself.
    """
    surgery = plan_gguf_surgery(file, removals)
    pruned = surgery.pruned()
    blocks = block_count(file) - len(removals)
    path = output or Path(f"{file.path.stem}-sleb-{blocks}-blocks.gguf")
    _require_place(path, pruned, force=force)
    outcome = _Outcome("--no-verify")
    with new_file(path) as aside:
        _write(pruned, aside, notify)
        if verify:
            _require_same_values(pruned, aside)
            outcome = _ask_transformers(surgery, aside, registry, notify)
    return GgufResult(
        schema_version=1,
        sleb_version=__version__,
        kind="gguf",
        source=str(file.path.absolute()),
        architecture=file.architecture,
        removals=surgery.removals,
        file=str(path),
        blocks=blocks,
        file_bytes=gguf_size(pruned),
        verified=verify,
        proof=outcome.proof,
        unproven=outcome.unproven,
    )


def _removals(request: SubjectRequest, file: GgufFile, notify: Notify) -> tuple[int, ...]:
    named = request.named
    if named is not None and not is_plan(named):
        if not (Path(named).exists() and file.path.samefile(named)):
            raise UsageError(
                f"--to-gguf removes blocks from {file.path}, and not from {named}.",
                hint="Name a plan, or leave out MODEL and give --blocks 5,4,9.",
            )
        if request.blocks is None:
            raise UsageError(f"Which blocks of {named} are to go?", hint="Name a plan, or give --blocks 5,4,9.")
    elif named is not None and request.blocks is not None:
        raise UsageError("--blocks goes with a model; a plan names its own blocks.", hint="Give one of the two.")
    if request.blocks is not None:
        return first_removals(request.blocks, request.remove, "--blocks")
    path = Path(named or DEFAULT_PLAN)
    plan = read_plan(path)
    if not request.any_model:
        require_same_kind_of_model(plan.model, file, notify)
    return first_of_plan(plan, request.remove, path).removals


def require_same_kind_of_model(model: ModelRecord, file: GgufFile, notify: Notify) -> None:
    """Make sure that a GGUF file may hold this model: by its type and its number of blocks.

    Raises:
        PlanError: it holds another one.
    """
    count = block_count(file)
    fits = may_be(file.architecture, model.model_type)
    if fits is False or model.blocks != count:
        raise PlanError(
            f"The blocks are those of {model.id} ({model.model_type}, {model.blocks} blocks), and {file.path} holds "
            f"another model ({file.architecture}, {count} blocks).",
            hint="Name a GGUF file of that model, or remove the blocks from this one all the same with --any-model.",
        )
    if fits is None:
        notify(
            Notice(
                f"Whether GGUF files of {model.model_type} are called {file.architecture} is not known to sleb; "
                f"the number of blocks fits."
            )
        )


def _require_place(path: Path, pruned: GgufFile, *, force: bool) -> None:
    if path.exists() and path.samefile(pruned.path):
        raise OutputError(f"{path} is the model itself.", hint="Choose another name with -o.")
    require_new_file(path, force=force)
    require_space(path, gguf_size(pruned))


def _write(pruned: GgufFile, aside: Path, notify: Notify) -> None:
    task = "Writing weights"
    notify(TaskStarted(task, sum(tensor.size for tensor in pruned.tensors), "B"))
    write_gguf(pruned, aside, lambda size: notify(TaskAdvanced(task, size)))
    notify(TaskFinished(task))


def _require_same_values(pruned: GgufFile, aside: Path) -> None:
    """Read the file with the format's own library, and compare every byte of every tensor with the source.

    Raises:
        ProofError: anything differs.
    """
    with translate_errors(lambda words: _failed(f"the gguf package cannot read it: {words}")):
        found = gguf.GGUFReader(aside).tensors
    source = np.memmap(pruned.path, mode="r")
    for tensor, expected in zip(found, pruned.tensors, strict=True):
        values = source[expected.start : expected.start + expected.size]
        if not _is_the_same(tensor, expected) or not np.array_equal(tensor.data.reshape(-1).view(np.uint8), values):
            raise _failed(f"{tensor.name} is not what {expected.name} should be")
    if read_gguf(aside).entries != pruned.entries:
        raise _failed("its metadata are not what was to be written")


def _is_the_same(found: gguf.ReaderTensor, expected: Tensor) -> bool:
    return (found.name, int(found.tensor_type), tuple(found.shape)) == (expected.name, expected.type, expected.shape)


def _ask_transformers(surgery: GgufSurgery, aside: Path, registry: Registry, notify: Notify) -> _Outcome:
    """Compare the pruned file, as transformers reads it, with the source as it reads that, the blocks switched off."""
    file = surgery.file
    if reason := _out_of_reach(file, aside):
        return _Outcome(reason)
    try:
        architecture = read_architecture(locate_model(str(file.path), notify), registry, notify)
        hf_surgery = plan_surgery(architecture, surgery.removals)
    except (ModelError, MachineError, UsageError) as error:
        return _Outcome(error.message.rstrip("."))
    if architecture.block_count != block_count(file):
        return _Outcome(f"transformers reads {architecture.block_count} blocks in it, and not {block_count(file)}")
    folder = aside.parent / "checkpoint"
    try:
        convert_gguf(aside, folder, notify)
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    kept = kept_tensors(hf_surgery)
    return _Outcome(None, prove(Reference(hf_surgery), folder, kept, proof_terms(architecture, None), notify))


def _out_of_reach(file: GgufFile, aside: Path) -> str | None:
    """Say why transformers cannot be asked at all, where that is known beforehand."""
    if not transformers_knows(file.architecture):
        return f"transformers does not read GGUF files of the architecture {file.architecture}"
    parameters = sum(math.prod(tensor.shape) for tensor in file.tensors)
    # It unpacks everything to float32 before it casts it; the weights are then written twice, dense and pruned.
    memory, disk = 8 * parameters, 8 * parameters
    available = free_bytes(torch.device("cpu"))
    if available < memory:
        return f"transformers would take {memory / 1e9:,.0f} GB of memory, and {available / 1e9:,.0f} GB are free"
    free = shutil.disk_usage(aside.parent).free
    if free < disk:
        return f"transformers would take {disk / 1e9:,.0f} GB on the disk, and {free / 1e9:,.0f} GB are free"
    return None


def _failed(what: str) -> ProofError:
    return ProofError(
        f"The pruned GGUF file failed its proof: {what}.",
        hint="Nothing was delivered. Report the model to us; --no-verify writes the file without proof.",
    )
