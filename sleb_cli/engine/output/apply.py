"""`sleb apply`: write the pruned checkpoint from the files of the dense one, and prove it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleb_cli import __version__
from sleb_cli.atomic import new_folder
from sleb_cli.engine.device import choose_dtype, dtype_name
from sleb_cli.engine.files.copying import copy_file
from sleb_cli.engine.files.shards import NewTensor, new_tensor, plan_shards, write_weights
from sleb_cli.engine.files.weights import read_json
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.card import model_card
from sleb_cli.engine.output.proof import Reference, proof_terms, prove
from sleb_cli.engine.output.push import PushRequest, push, require_pushable
from sleb_cli.engine.recovery.heal_state import HealState
from sleb_cli.engine.recovery.run import Recovered, RecoveryRequest, recover
from sleb_cli.engine.surgery.quantization import QUANTIZATION_FILES, prune_module_names
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify
from sleb_cli.processes import is_main_process
from sleb_cli.results import ApplyResult
from sleb_plugins import OutputError, UnsupportedModelError, UsageError

PLAN_FILE = "sleb_plan.json"

# What the checkpoint has its own of, beside weights and settings.
_WRITTEN_ANEW = {"README.md", PLAN_FILE}
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|onnx_data|ot|ckpt|tflite|nemo)|.*\.index\.json", re.IGNORECASE
)
# The model once more, as other programs read it, with settings that speak of all its blocks.
_OTHER_FORMATS = {"original", "onnx", "openvino", "coreml", "gguf", "metal"}


def apply_removals(
    subject: Subject,
    output: Path | None,
    notify: Notify,
    *,
    max_shard_size: str,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
    push_to: PushRequest | None = None,
    recovery: RecoveryRequest | None = None,
    check: Callable[[Path], None] | None = None,
) -> ApplyResult:
    """Write the pruned checkpoint into `output`, whole and proven, or write nothing.

    With `recovery`, the blocks that stay are given new values. `check` sees the finished folder; what it raises keeps
    it back.

    Raises:
        ProofError: the checkpoint does not compute what the model in memory does.
        OutputError: the folder exists, or cannot be written, or the hub does not take it.
    """
    surgery, source = subject.surgery, subject.architecture.source
    shard_bytes = parse_size(max_shard_size)
    cast = _cast(dtype, subject)
    terms = proof_terms(subject.architecture, cast)
    folder = output or Path(f"{source.name}-sleb-{len(surgery.names.new_number)}-blocks")
    require_new_folder(folder, source, force=force)
    if push_to:
        require_pushable(push_to, force=force)
    state = HealState(folder)
    if recovery and recovery.heal:
        state.require(resume=recovery.heal.resume, force=force)
    recovered = _recover(subject, recovery, cast, state, notify)
    kept = kept_tensors(surgery, cast)
    if recovered:
        kept = _with_values(kept, recovered.tensors)
    shards = plan_shards(source.weights, kept, shard_bytes)
    settings = _settings(surgery, cast)
    beside = _files_beside(source, written=set(settings))
    with new_folder(folder, replace=force) as aside:
        weights_bytes = write_weights(aside, shards, beside.bytes, notify)
        for name, values in settings.items():
            (aside / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        beside.copy(aside)
        reference = Reference(surgery, recovered.parameters if recovered else None)
        proof = prove(reference, aside, kept, terms, notify) if verify else None
        record = recovered.record if recovered else None
        if subject.plan:
            subject.plan.model_copy(update={"recovery": record, "proof": proof}).write(aside / PLAN_FILE)
        (aside / "README.md").write_text(model_card(subject, record, proof), encoding="utf-8")
        if check:
            check(aside)
    if recovery and recovery.heal:
        state.delete()
    if beside.left_out:
        notify(Notice(f"Left out, because they hold the whole model in another form: {', '.join(beside.left_out)}."))
    pushed = push(folder, push_to, notify, force=force) if push_to else None
    return ApplyResult(
        schema_version=1,
        sleb_version=__version__,
        kind="apply",
        model=subject.architecture.record,
        removals=surgery.removals,
        dtype=dtype_name(terms.dtype),
        device=terms.device.type,
        folder=str(folder),
        blocks=len(surgery.names.new_number),
        weights_bytes=weights_bytes,
        recovery=record,
        proof=proof,
        pushed=pushed,
    )


def _recover(
    subject: Subject, request: RecoveryRequest | None, cast: torch.dtype | None, state: HealState, notify: Notify
) -> Recovered | None:
    """Recover, where that was asked for; of processes that did it together, only the main one comes back."""
    recovered = recover(subject, request, cast, state, notify) if request else None
    if not is_main_process():
        raise SystemExit(0)
    return recovered


def require_new_folder(folder: Path, source: ModelSource, *, force: bool) -> None:
    """Make sure that nothing is overwritten unasked, and never what is no checkpoint, or the source itself.

    Raises:
        OutputError: the folder exists (without `force`), holds something else, or holds the dense model.
    """
    resolved = folder.resolve()
    if resolved == source.folder or resolved in source.folder.parents:
        raise OutputError(f"{folder} holds the model itself.", hint="Choose another folder with -o.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()) and force):
        return
    if not force:
        raise OutputError(f"{folder} exists.", hint="Choose another folder with -o, or replace it with --force.")
    if not (folder / "config.json").is_file():
        raise OutputError(
            f"{folder} exists and is no checkpoint, so --force does not replace it.",
            hint="Choose another folder with -o, or remove it yourself.",
        )


def parse_size(text: str) -> int:
    """Read a size such as 5GB (powers of ten) or 512MiB (powers of two), in bytes.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(I?)B?", text.strip().upper())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2] or " ")) if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size.", hint="Write it like 5GB or 512MiB.")
    return size


def _cast(dtype: str | None, subject: Subject) -> torch.dtype | None:
    if dtype is None:
        return None
    if subject.architecture.is_quantized:
        raise UnsupportedModelError(
            f"{subject.architecture.source.id} is quantized: its weights cannot be written as {dtype}.",
            hint="Leave out --dtype, and they stay as they are.",
        )
    return choose_dtype(dtype, subject.architecture.config.dtype, torch.device("cpu"))


def kept_tensors(surgery: Surgery, cast: torch.dtype | None = None) -> list[NewTensor]:
    """Give the tensors of the pruned checkpoint, from the headers of the dense one's files."""
    stored = ((tensor.name, tensor) for tensor in surgery.architecture.source.weights.stored)
    return [new_tensor(name, tensor, cast, surgery.cut(name)) for name, tensor in surgery.names.prune(stored)]


def _with_values(kept: Sequence[NewTensor], values: Mapping[str, torch.Tensor]) -> list[NewTensor]:
    """Put new values in the place of stored ones."""
    return [replace(tensor, value=values[tensor.name]) if tensor.name in values else tensor for tensor in kept]


def _settings(surgery: Surgery, cast: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """Give the files that speak of blocks by number: the config, and what quantized formats have beside it."""
    config = surgery.prune_config() | ({"dtype": dtype_name(cast)} if cast else {})
    folder = surgery.architecture.source.folder
    return {"config.json": config} | {
        name: prune_module_names(read_json(folder / name), surgery.architecture, surgery.names)
        for name in QUANTIZATION_FILES
        if (folder / name).is_file()
    }


@dataclass(frozen=True)
class _FilesBeside:
    """What lies beside config and weights: the files that come along, and the names of what is left out."""

    folder: Path
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """How large the files are."""
        return sum(file.stat().st_size for file in self.files)

    def copy(self, folder: Path) -> None:
        """Copy the files to where they were, in another folder."""
        for file in self.files:
            target = folder / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, target)


def _files_beside(source: ModelSource, written: set[str]) -> _FilesBeside:
    """Find the tokenizer, the generation config, the licence, code, and whatever else belongs to the model.

    Hidden entries stay behind, and folders with a config of their own: those are other models.
    """
    files: list[Path] = []
    left_out: list[str] = []
    ours = set(source.weights.names)
    # Mistral's own format: weights in consolidated.safetensors, and their settings in params.json.
    consolidated = any(source.folder.glob("consolidated*"))
    for path in sorted(source.folder.iterdir()):
        name = path.name
        if (
            name.startswith(".")
            or name in _WRITTEN_ANEW | written
            or (path.is_dir() and (path / "config.json").is_file())
        ):
            continue
        if name in _OTHER_FORMATS and path.is_dir():
            left_out.append(f"{name}/")
        elif consolidated and (name.startswith("consolidated") or name == "params.json"):
            left_out.append(name)
        else:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                inside = str(file.relative_to(source.folder))
                if file.is_file() and not _WEIGHTS.fullmatch(file.name):
                    files.append(file)
                elif file.is_file() and inside not in ours and not name.endswith(".index.json"):
                    left_out.append(inside)
    return _FilesBeside(source.folder, tuple(files), tuple(left_out))
