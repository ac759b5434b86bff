"""`sleb apply`: write the pruned checkpoint from the files of the dense one, and prove it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleb_cli.atomic import new_folder, remove_leftovers_of, require_space, to_json
from sleb_cli.engine.device import choose_dtype, dtype_name
from sleb_cli.engine.files import other_formats
from sleb_cli.engine.files.copying import copy_file, leads_out
from sleb_cli.engine.files.shards import NewTensor, Shard, named_shards, new_tensor, plan_shards, write_weights
from sleb_cli.engine.files.weights import read_json
from sleb_cli.engine.forward.placement import resolve_device_map
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.card import CARD, checkpoint_name, model_card
from sleb_cli.engine.output.measured import measured_of_plan
from sleb_cli.engine.output.proof import (
    Planned,
    PlannedFiles,
    Reference,
    choose_proof_settings,
    kept_if_it_fails,
    prove,
    require_nothing_kept,
)
from sleb_cli.engine.output.push import PushRequest, files_of, push, require_pushable
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.run import Recovered, recover
from sleb_cli.engine.recovery.unfinished import Unfinished, clear_old
from sleb_cli.engine.surgery.quantization import QUANTIZATION_FILES, prune_module_names
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.kept_results import beside_plan
from sleb_cli.plan import CHECKPOINT_PLAN
from sleb_cli.processes import WorkerFinished
from sleb_cli.records import without_folders
from sleb_cli.requests import DEFAULT_SHARD_SIZE, ApplyRequest
from sleb_cli.results import ApplyResult, BenchResult, EvalResult
from sleb_cli.units import parse_bytes
from sleb_cli.version import __version__
from sleb_plugins import OutputError, UnsupportedModelError, UsageError

# Files of settings that may name blocks or local paths, besides the config.
_SETTINGS = (*QUANTIZATION_FILES, "tokenizer_config.json", "generation_config.json", "processor_config.json")

# Files that the pruned checkpoint has its own versions of, beside weights and settings.
_REWRITTEN = {CARD, CHECKPOINT_PLAN}

_START_BYTES = 200
"""In so many bytes at its start, each record of ours says which version of sleb wrote it."""


def require_coherent(request: ApplyRequest) -> None:
    """Check that the options of a request fit together.

    Raises:
        UsageError: an option is given without another that it requires.
    """
    if request.public and request.push is None:
        raise UsageError("--public requires --push.", hint="Name the repository: --push ORG/NAME --public.")
    if request.keep_failed is not None and request.no_verify:
        raise UsageError("--keep-failed requires the proof that --no-verify skips.", hint="Use one of them.")
    _require_any(request, ("heal_minutes", "heal_tokens", "resume"), ("heal",))
    _require_any(request, ("calibration", "samples", "sequence_length", "seed", "device"), ("recover", "heal"))


def _require_any(request: ApplyRequest, names: Sequence[str], needed: Sequence[str]) -> None:
    given = [name for name in names if getattr(request, name) not in (None, False)]
    if given and not any(getattr(request, name) for name in needed):
        options = " or ".join(f"--{name}" for name in needed)
        raise UsageError(f"--{given[0].replace('_', '-')} requires {options}.", hint="Use both, or neither.")


def apply_removals(
    subject: Subject,
    request: ApplyRequest,
    notify: Notify,
    check: Callable[[Path], None] | None = None,
    group: ProcessGroup | None = None,
) -> ApplyResult:
    """Write the pruned checkpoint, complete and proven, or write nothing.

    `check` is called with the finished folder; if it raises, nothing is written. The processes of a group recover
    together.

    Raises:
        ProofError: the checkpoint does not compute the same as the model in memory.
        OutputError: the folder exists or cannot be written, or the Hub rejects it.
        WorkerFinished: this process only helped to recover; the main process writes the checkpoint.
    """
    surgery = subject.surgery
    shard_size = DEFAULT_SHARD_SIZE if request.max_shard_size is None else request.max_shard_size
    shard_bytes = parse_bytes(str(shard_size), "--max-shard-size")
    cast = _cast(request.dtype, subject)
    device_map = resolve_device_map(request, subject.architecture)
    proof_settings = choose_proof_settings(subject.architecture, cast, device_map, request.stream)
    outputs = _resolve_outputs(subject, request)
    folder, state = outputs.folder, outputs.state
    group = group or ProcessGroup()
    if not group.is_main:
        _recover(subject, request, cast, state, group, notify)
        raise WorkerFinished
    # The place is claimed before hours of recovery, so that nobody else writes there, nor heals in the same state.
    with (
        state.told_on_failure(notify),
        new_folder(folder, replace=outputs.replace) as aside,
        subject.architecture.source.watch.unchanged(),
    ):
        if request.recover or request.heal:
            _plan_checkpoint(surgery, cast, None, shard_bytes).require_space(aside)
        recovered = _recover(subject, request, cast, state, group, notify)
        record = recovered.record if recovered else None
        checkpoint = _plan_checkpoint(surgery, cast, recovered, shard_bytes)
        weights_bytes = checkpoint.write(aside, notify)
        reference = Reference(surgery, recovered.parameters if recovered else None)
        proof = None
        if not request.no_verify:
            with kept_if_it_fails(aside, request.keep_failed):
                proof = prove(reference, aside, checkpoint.planned, proof_settings, notify)
        if subject.plan:
            plan = subject.plan.model_copy(update={"recovery": record, "proof": proof})
            (aside / CHECKPOINT_PLAN).write_text(to_json(plan.published().to_data()), encoding="utf-8")
            if record is None:
                _keep_results(subject, aside, notify)
        (aside / CARD).write_text(model_card(subject, aside, record, proof), encoding="utf-8")
        if check:
            check(aside)
        written = files_of(aside)
    if recovered:
        state.delete()
    if left_out := checkpoint.other_files.left_out:
        notify(Notice(f"Not copied, because they hold the model in other formats: {', '.join(left_out)}."))
    if outside := checkpoint.other_files.outside:
        notify(Warned(f"Not copied, because they are links out of the model's folder: {', '.join(outside)}."))
    return ApplyResult(
        schema_version=1,
        sleb_version=__version__,
        kind="apply",
        model=subject.architecture.record,
        removals=surgery.removals,
        dtype=dtype_name(proof_settings.dtype),
        device=proof_settings.device.type,
        folder=str(folder),
        blocks=len(surgery.kept.blocks),
        weights_bytes=weights_bytes,
        recovery=record,
        proof=proof,
        pushed=push(folder, written, outputs.push_to, notify, force=request.force) if outputs.push_to else None,
    )


def _keep_results(subject: Subject, folder: Path, notify: Notify) -> None:
    """Copy what was measured of the plan into the checkpoint, without local folders."""
    plan, file = subject.plan, subject.file
    if plan is None or file is None or plan.model.fingerprint != subject.architecture.record.fingerprint:
        return
    copy = folder / CHECKPOINT_PLAN
    if evaluation := measured_of_plan(EvalResult, file, plan, notify):
        # Files of lm-eval are not copied.
        evaluation.model_copy(update={"lm_eval": ()}).write(beside_plan(copy, "eval"))
    if benchmark := measured_of_plan(BenchResult, file, plan, notify):
        benchmark.write(beside_plan(copy, "bench"))


@dataclass(frozen=True)
class _Outputs:
    """Where the checkpoint, its upload and an unfinished recovery go, and if the checkpoint may replace another one."""

    folder: Path
    replace: bool
    push_to: PushRequest | None
    state: Unfinished


def _resolve_outputs(subject: Subject, request: ApplyRequest) -> _Outputs:
    """Return where the checkpoint, its upload and an unfinished recovery go, after checking that all of them can."""
    source = subject.architecture.source
    folder = request.output or Path(checkpoint_name(source.name, len(subject.surgery.kept.blocks)))
    state = Unfinished(folder)
    clear_old(folder.absolute().parent)
    replace = state.may_replace(resume=request.resume, force=request.force)
    require_new_folder(folder, source, force=replace)
    push_to = PushRequest(request.push, private=not request.public) if request.push is not None else None
    if push_to:
        require_pushable(push_to, force=request.force)
    require_nothing_kept(request.keep_failed)
    if request.recover or request.heal:
        state.require(resume=request.resume, force=request.force)
    return _Outputs(folder, replace, push_to, state)


def _recover(
    subject: Subject,
    request: ApplyRequest,
    cast: torch.dtype | None,
    state: Unfinished,
    group: ProcessGroup,
    notify: Notify,
) -> Recovered | None:
    """Recover if requested, together with the other processes."""
    return recover(subject, request, cast, state, group, notify) if request.recover or request.heal else None


def require_new_folder(folder: Path, source: ModelSource, *, force: bool) -> None:
    """Check that the folder is new, or with `force` a checkpoint other than the source.

    Raises:
        OutputError: the folder exists (without `force`), is not a checkpoint, or holds the dense model.
    """
    remove_leftovers_of(folder)
    resolved = folder.resolve()
    if resolved == source.folder or resolved in source.folder.parents:
        raise OutputError(f"{folder} contains the source model.", hint="Choose another folder with -o.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()) and force):
        return
    if not force:
        raise OutputError(
            f"{folder} already exists.", hint="Choose another folder with -o, or replace it with --force."
        )
    if not (folder / "config.json").is_file():
        raise OutputError(
            f"{folder} exists and is not a checkpoint, so --force does not replace it.",
            hint="Choose another folder with -o, or delete it yourself.",
        )


def _cast(dtype: str | None, subject: Subject) -> torch.dtype | None:
    if dtype is None:
        return None
    if subject.architecture.is_quantized:
        raise UnsupportedModelError(
            f"{subject.architecture.source.id} is quantized: its weights cannot be cast to {dtype}.",
            hint="Leave out --dtype to keep them as they are.",
        )
    return choose_dtype(dtype, subject.architecture.dtype, torch.device("cpu"))


def kept_tensors(
    surgery: Surgery, cast: torch.dtype | None = None, values: Mapping[str, torch.Tensor] | None = None
) -> list[NewTensor]:
    """Return the tensors of the pruned checkpoint, from the headers of the dense one's files, and new values."""
    stored, values = ((tensor.name, tensor) for tensor in surgery.architecture.source.weights.stored), values or {}
    kept = [new_tensor(name, tensor, cast, surgery.cut(name)) for name, tensor in surgery.names.prune(stored)]
    return [replace(tensor, value=values[tensor.name]) if tensor.name in values else tensor for tensor in kept]


def _settings(surgery: Surgery, cast: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """Return the contents of the files that change: the config, settings of quantized formats, and local paths."""
    config = surgery.prune_config()
    if cast and "torch_dtype" not in config:
        config = {"dtype": None} | config
    config = _with_dtype(config, dtype_name(cast) if cast else None)
    folder = surgery.architecture.source.folder
    own = [name for name in _SETTINGS if (folder / name).is_file() and not leads_out(folder / name, folder)]
    before = {name: read_json(folder / name) for name in own}
    after = {
        name: _without_paths(prune_module_names(values, surgery.architecture, surgery.names))
        if name in QUANTIZATION_FILES
        else _without_paths(values)
        for name, values in before.items()
    }
    return {"config.json": _without_paths(config)} | {name: after[name] for name in own if after[name] != before[name]}


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that do not say where on this machine a model was: the checkpoint may be published."""
    return {
        key: _without_paths(value)
        if isinstance(value, dict)
        else without_folders(value)
        if isinstance(value, str) and key.endswith("name_or_path")
        else value
        for key, value in settings.items()
    }


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config of this data type, or None for its own, in nested configs too; of both spellings, only `dtype`.

    Where both have a value, `dtype` is the one that transformers reads.
    """
    named = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    if "dtype" in named and "torch_dtype" in named:
        other = named.pop("torch_dtype")
        named["dtype"] = other if named["dtype"] is None else named["dtype"]
    return named | {key: dtype for key in ("dtype", "torch_dtype") if dtype and key in named}


@dataclass(frozen=True)
class _OtherFiles:
    """The other files of the source: those to copy, and the names of those left out.

    `left_out` are the model in other formats, and `outside` links out of the folder, such as to private files.
    """

    folder: Path
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """The total size of the files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def by_name(self) -> dict[str, Path]:
        """The files by their relative paths."""
        return {file.relative_to(self.folder).as_posix(): file for file in self.files}

    def copy(self, folder: Path) -> None:
        """Copy the files to the same relative paths in `folder`."""
        for name, file in self.by_name.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, target)


@dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint consists of, before it is written."""

    tensors: list[NewTensor]
    shards: list[Shard]
    settings: dict[str, dict[str, Any]]
    other_files: _OtherFiles

    def require_space(self, folder: Path) -> None:
        """Check that the disk has room for the weights that change and the other files.

        Raises:
            OutputError: it does not.
        """
        changed = sum(shard.size for shard in self.shards if not shard.same_as)
        require_space(folder, changed + self.other_files.bytes)

    def write(self, folder: Path, notify: Notify) -> int:
        """Write weights, settings and other files; return the size of the weights in bytes."""
        weights_bytes = write_weights(folder, self.shards, self.other_files.bytes, notify)
        for name, text in self._texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        self.other_files.copy(folder)
        return weights_bytes

    @property
    def planned(self) -> Planned:
        """What the folder holds after that."""
        return Planned(self.tensors, PlannedFiles(named_shards(self.shards), self._texts, self.other_files.by_name))

    @property
    def _texts(self) -> dict[str, str]:
        """The contents of the files with settings."""
        return {name: json.dumps(values, indent=2) + "\n" for name, values in self.settings.items()}


def _plan_checkpoint(
    surgery: Surgery, cast: torch.dtype | None, recovered: Recovered | None, shard_bytes: int
) -> _Checkpoint:
    source, settings = surgery.architecture.source, _settings(surgery, cast)
    tensors = kept_tensors(surgery, cast, recovered.tensors if recovered else None)
    shards = plan_shards(source.weights, tensors, shard_bytes)
    return _Checkpoint(tensors, shards, settings, _find_other_files(source, written=set(settings)))


def _find_other_files(source: ModelSource, written: set[str]) -> _OtherFiles:
    """Find the tokenizer, generation config, licence, code, and anything else that belongs to the model."""
    folder, weight_files = source.folder, set(source.weights.names)
    # Mistral's own format: weights in consolidated.safetensors, settings in params.json.
    consolidated = {path.name for path in folder.glob("consolidated*")}
    in_other_formats = consolidated | {"params.json"} if consolidated else set()
    files: list[Path] = []
    left_out: list[str] = []
    outside: list[str] = []
    for path in _entries(folder, _REWRITTEN | written | weight_files):
        inside = str(path.relative_to(folder))
        if leads_out(path, folder):
            outside.append(inside)
        elif path.is_file() and _is_ours(path):
            continue
        elif path.is_file() and not other_formats.is_weights(path.name) and inside not in in_other_formats:
            files.append(path)
        elif path.is_file() and inside not in weight_files:
            left_out.append(inside)
        elif path.is_dir() and path.parent == folder:
            left_out.append(f"{inside}/")
    return _OtherFiles(folder, tuple(files), tuple(left_out), tuple(outside))


def _is_ours(path: Path) -> bool:
    """Whether a file is a plan, a result or a journal, which name local folders and do not describe the checkpoint."""
    if path.suffix == ".json":
        with path.open("rb") as file:
            return b'"sleb_version"' in file.read(_START_BYTES)
    return path.suffix == ".journal" or ".journal.walk." in path.name


def _entries(folder: Path, skipped: set[str]) -> Iterator[Path]:
    """Yield all files and links that may belong to the model; a folder with another format of it, as a whole.

    Hidden entries are skipped, and so are folders with their own config, which are other models.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in skipped or path.name.endswith(".index.json"):
            continue
        if leads_out(path, folder) or not path.is_dir() or path.name in other_formats.FOLDERS:
            yield path
        elif not (path / "config.json").is_file():
            yield from (inner for inner in sorted(path.rglob("*")) if not _is_hidden(inner.relative_to(path)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
