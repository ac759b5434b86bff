"""Write a pruned GGUF file row by row from the source, quantized or not, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sleb_cli.atomic import claimed, free_space, require_space
from sleb_cli.engine.cut.protocol import cut_records
from sleb_cli.engine.device import CPU
from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.gguf.block_rules import holds_model_type
from sleb_cli.engine.gguf.blocks import block_count
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor, gguf_size, read_gguf, write_gguf
from sleb_cli.engine.gguf.quick import QuickReader
from sleb_cli.engine.memory import memory_shortage, shortage
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.gguf_conversion import (
    convert_tokenizer,
    convert_weights,
    transformers_knows,
)
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.checkpoint import Output, move_if_proof_fails, plan_tensors
from sleb_cli.engine.output.proof import prove
from sleb_cli.engine.output.proof_of_files import Planned, model_errors_fail_proof, proof_error
from sleb_cli.engine.output.proof_placement import place_proof
from sleb_cli.engine.surgery.gguf_surgery import GgufSurgery
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notice, Notify, task
from sleb_cli.names import checkpoint_name
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import THIS_VERSION, ModelRecord, Proof
from sleb_cli.results import GgufResult
from sleb_plugins import MachineError, ModelError, PlanError, UsageError

KIND = "GGUF file"
"""For messages of a failed proof."""


def default_file(surgery: GgufSurgery) -> Path:
    """Return the path of a pruned file for which the user named none."""
    suffixes: list[str] = []
    for cut in surgery.cuts:
        suffixes += cut.name_parts
    blocks = block_count(surgery.file) - len(surgery.removals)
    return Path(f"{checkpoint_name(surgery.file.path.stem, blocks, suffixes)}.gguf")


def prune_gguf(
    surgery: GgufSurgery, output: Output, registry: Registry, notify: Notify
) -> GgufResult:
    """Write the pruned file, complete and checked, or nothing."""
    file = surgery.file
    pruned = surgery.pruned()
    watch = Watch(file.path)
    with claimed(output.path, replace=output.replace) as aside, watch.unchanged():
        if read_gguf(file.path) != file:
            raise ModelError(
                f"{file.path} changed while it was read.", hint="Run the command again."
            )
        require_space(output.path, gguf_size(pruned))
        size = sum(tensor.size for tensor in pruned.tensors)
        with task(notify, "Writing weights", size, "B") as advance:
            write_gguf(pruned, aside, advance)
        proof: Proof | None = None
        unproven: str | None = "--no-verify"
        if output.verify:
            with move_if_proof_fails(aside, output.keep_failed):
                _require_as_planned(pruned, aside)
                proof, unproven = _prove_with_transformers(surgery, aside, registry, notify)
    for cut in surgery.cuts:
        if cut.note:
            notify(Notice(cut.note))
    return GgufResult(
        **THIS_VERSION,
        kind="gguf",
        source=str(file.path.absolute()),
        architecture=file.architecture,
        removals=surgery.removals,
        file=str(output.path),
        blocks=block_count(file) - len(surgery.removals),
        file_bytes=gguf_size(pruned),
        verified=output.verify,
        **cut_records(surgery.cuts, file.tensors, pruned.tensors),
        proof=proof,
        unproven=unproven,
    )


def require_same_kind_of_model(model: ModelRecord, file: GgufFile, notify: Notify) -> None:
    """Check that a GGUF file may hold this model, by its type and number of blocks."""
    count = block_count(file)
    fits = holds_model_type(file.architecture, model.model_type)
    if fits is False or model.blocks != count:
        raise PlanError(
            f"The blocks are those of {model.id} ({model.model_type}, {model.blocks} blocks), but "
            f"{file.path} holds another model ({file.architecture}, {count} blocks).",
            hint="Name a GGUF file of that model, or remove these blocks from this one with "
            "--any-model.",
        )
    if fits is None:
        notify(
            Notice(
                f"sleb does not know if GGUF files of {model.model_type} have the architecture "
                f"{file.architecture}; "
                "the number of blocks matches."
            )
        )


def _require_as_planned(pruned: GgufFile, aside: Path) -> None:
    """Compare the file's metadata and every byte of every tensor with the source."""
    with model_errors_fail_proof(KIND):
        written = read_gguf(aside)
    # The gguf package reads both files: it shares no code with what wrote this one.
    with translate_errors(
        lambda words: proof_error(f"the gguf package cannot read it: {words}", KIND)
    ):
        tensors = QuickReader(aside).tensors
        with reading(pruned.path):
            source = QuickReader(pruned.path).tensors
    if (difference := _first_difference(written, pruned)) is not None:
        raise proof_error(f"its metadata differs from what is expected: {difference}", KIND)
    if len(tensors) != len(pruned.tensors):
        raise proof_error(f"it holds {len(tensors)} tensors, not {len(pruned.tensors)}", KIND)
    originals = {tensor.data_offset: tensor for tensor in source}
    for tensor, expected in zip(tensors, pruned.tensors, strict=True):
        original = originals.get(expected.start)
        written_as = (tensor.name, tensor.tensor_type, tuple(tensor.shape))
        is_planned = written_as == (expected.name, expected.type, expected.shape)
        if not is_planned or original is None or not _is_same(tensor, original, expected):
            raise proof_error(
                f"the tensor {tensor.name} differs from the expected {expected.name}", KIND
            )
    if (size := aside.stat().st_size) != gguf_size(pruned):
        raise proof_error(f"it has {size} bytes, not {gguf_size(pruned)}", KIND)


def _first_difference(written: GgufFile, expected: GgufFile) -> str | None:
    """Describe the first difference of the metadata, if any."""
    if written.version != expected.version:
        return f"version {written.version}, not {expected.version}"
    entries = {entry.key: entry for entry in written.entries}
    for entry in expected.entries:
        actual = entries.pop(entry.key, None)
        if actual is None:
            return f"{entry.key} is missing"
        if actual != entry:
            return f"{entry.key} is different"
    if entries:
        return f"{next(iter(entries))} is unexpected"
    if written.entries != expected.entries:
        return "the entries are in a different order"
    return None


def _is_same(tensor: gguf.ReaderTensor, original: gguf.ReaderTensor, expected: GgufTensor) -> bool:
    """Whether the tensor has the bytes of the rows that stay."""
    rows = original.data
    if expected.rows is not None:
        rows = rows[list(expected.rows)]
    return _bytes_of(tensor.data) == _bytes_of(rows)


def _bytes_of(data: Any) -> memoryview:
    return memoryview(data.reshape(-1).view(np.uint8))


def _prove_with_transformers(
    surgery: GgufSurgery, aside: Path, registry: Registry, notify: Notify
) -> tuple[Proof | None, str | None]:
    """Compare the pruned file with the source without these blocks, as transformers reads both.

    Returns:
        the proof, or the reason why there is none.
    """
    file = surgery.file
    if not transformers_knows(file.architecture):
        what = f"GGUF files of the architecture {file.architecture}"
        return None, f"transformers does not read {what}"
    # It unpacks all weights to float32 before casting them, and they are then written twice, dense
    # and pruned.
    needed = 8 * file.parameters
    disk = free_space(aside.parent)
    lacking = memory_shortage(needed, CPU, whole=True) or shortage(needed, disk, "disk space")
    if lacking:
        return None, f"transformers needs {lacking}"
    try:
        architecture = read_architecture(locate_model(str(file.path), notify), registry, notify)
        cuts = [cut.for_model(architecture) for cut in surgery.cuts]
        hf_surgery = Surgery(architecture, tuple(cuts))
    except (ModelError, MachineError, UsageError) as error:
        return None, error.message.rstrip(".")
    if architecture.block_count != block_count(file):
        count = architecture.block_count
        return None, f"transformers reads {count} blocks in it, not {block_count(file)}"
    folder = aside.with_name(f"{aside.name}.checkpoint")
    with model_errors_fail_proof(KIND), task(notify, f"Converting {aside.name}"):
        convert_weights(read_gguf(aside), folder, architecture.dtype)
        if hf_surgery.tokens is not None:
            convert_tokenizer(aside, folder)
    planned = Planned(plan_tensors(hf_surgery))
    return prove(hf_surgery, folder, planned, place_proof(architecture, None), notify), None
