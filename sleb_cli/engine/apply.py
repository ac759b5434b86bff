"""`sleb apply`: write the pruned checkpoint from the files of the dense one, and prove it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sleb_cli import __version__
from sleb_cli.atomic import new_folder
from sleb_cli.engine.card import model_card
from sleb_cli.engine.checkpoint import write_shards
from sleb_cli.engine.loading import choose_device, choose_dtype, dtype_name
from sleb_cli.engine.proof import prove
from sleb_cli.engine.source import ModelSource
from sleb_cli.engine.subject import Subject
from sleb_cli.engine.surgery import Surgery
from sleb_cli.events import Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.results import ApplyResult
from sleb_plugins import ModelError, OutputError, UnsupportedModelError, UsageError

PLAN_FILE = "sleb_plan.json"

_WEIGHTS = set(
    [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".ckpt"]
)
_NOT_COPIED = {"config.json", "README.md", PLAN_FILE}


def apply_removals(
    subject: Subject,
    output: Path | None,
    notify: Notify,
    *,
    max_shard_size: str,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
    check: Callable[[Path], None] | None = None,
) -> ApplyResult:
    """Write the pruned checkpoint into `output`, whole and proven, or write nothing.

    `check` sees the finished folder; what it raises keeps it back.

    Raises:
        ProofError: the checkpoint does not do what the gated dense model does.
        OutputError: the folder exists, or cannot be written.
    """
    surgery, source = subject.surgery, subject.architecture.source
    shard_bytes = parse_size(max_shard_size)
    cast = _cast(dtype, subject)
    device = choose_device("auto")
    proof_dtype = cast or choose_dtype("auto", subject.architecture, device)
    folder = output or Path(f"{source.name}-sleb-{len(surgery.new_number)}-blocks")
    require_new_folder(folder, source, force=force)
    with new_folder(folder, replace=force) as aside:
        weights_bytes = _write_weights(surgery, aside, shard_bytes, cast, notify)
        config = surgery.prune_config() | ({"dtype": dtype_name(cast)} if cast else {})
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_small_files(source, aside)
        proof = prove(surgery, aside, proof_dtype, device, notify) if verify else None
        if subject.plan:
            subject.plan.write(aside / PLAN_FILE)
        (aside / "README.md").write_text(model_card(subject, proof, dtype_name(proof_dtype)), encoding="utf-8")
        if check:
            check(aside)
    return ApplyResult(
        schema_version=1,
        sleb_version=__version__,
        kind="apply",
        model=subject.architecture.record,
        removals=surgery.removals,
        dtype=dtype_name(proof_dtype),
        device=device.type,
        folder=str(folder),
        blocks=len(surgery.new_number),
        weights_bytes=weights_bytes,
        proof=proof,
    )


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
    if "quantization_config" in subject.architecture.source.raw_config:
        raise UnsupportedModelError(
            f"{subject.architecture.source.id} is quantized: its weights cannot be written as {dtype}.",
            hint="Leave out --dtype, and they stay as they are.",
        )
    return choose_dtype(dtype, subject.architecture, torch.device("cpu"))


def _write_weights(surgery: Surgery, folder: Path, shard_bytes: int, cast: torch.dtype | None, notify: Notify) -> int:
    task = "Writing weights"
    total = sum(path.stat().st_size for path in surgery.architecture.source.weights.paths)
    kept = total * len(surgery.new_number) // surgery.architecture.block_count
    notify(TaskStarted(task, kept, "B"))
    written = 0
    for size in write_shards(folder, _cast_tensors(_kept_tensors(surgery), cast), shard_bytes):
        written += size
        notify(TaskAdvanced(task, size))
    notify(TaskFinished(task))
    return written


def _kept_tensors(surgery: Surgery) -> Iterator[tuple[str, torch.Tensor]]:
    return surgery.prune_tensors(surgery.architecture.source.weights.tensors())


def _cast_tensors(
    tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _copy_small_files(source: ModelSource, folder: Path) -> None:
    """Copy the tokenizer, the generation config, the licence and whatever else belongs to the model but is no weights.

    Hidden entries stay behind, and folders with a config of their own: those are other models.
    """
    for path in source.folder.iterdir():
        is_other_model = path.is_dir() and (path / "config.json").is_file()
        if path.name.startswith(".") or path.name in _NOT_COPIED or is_other_model:
            continue
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json"):
                target = folder / file.relative_to(source.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, target)


def _copy(file: Path, target: Path) -> None:
    try:
        content = file.read_bytes()
    except PermissionError as error:
        raise ModelError(f"You may not read {file}.", hint="Change its permissions.") from error
    target.write_bytes(content)
