"""Write a pruned checkpoint from the dense one's files, and prove it before it appears."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sleb_cli.atomic import claimed, require_space, to_json, writing
from sleb_cli.engine.cut.protocol import cut_records
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files import other_formats
from sleb_cli.engine.files.config_files import CONFIG, SETTINGS, map_values, read_json
from sleb_cli.engine.files.copying import copy_file, holds_file, links_outside, reading
from sleb_cli.engine.files.shards import (
    WEIGHTS_TASK,
    NewTensor,
    new_tensor,
    plan_shards,
    write_weights,
)
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.card import CARD, model_card
from sleb_cli.engine.output.measured import join_results, results_of_plan
from sleb_cli.engine.output.proof import PROOF_TASK, prove
from sleb_cli.engine.output.proof_of_files import Planned
from sleb_cli.engine.output.proof_placement import ProofPlacement, place_proof
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, TasksAhead, Warned
from sleb_cli.names import without_folders
from sleb_cli.plan import CHECKPOINT_PLAN, RecoveryRecord
from sleb_cli.records import THIS_VERSION
from sleb_cli.requests import DEFAULT_SHARD_SIZE
from sleb_cli.results import ApplyResult, BenchResult, EvalResult
from sleb_cli.saved_results import results_folder
from sleb_cli.units import parse_bytes
from sleb_plugins import OutputError, ProofError

if TYPE_CHECKING:
    from sleb_cli.engine.recovery.recover import Recovered
    from sleb_cli.engine.recovery.stage import RecoverySettings

# Besides weights and settings.
_REWRITTEN = {CARD, CHECKPOINT_PLAN}

_START_BYTES = 200
"""Our records name the version of sleb that wrote them within these first bytes."""

_RECORDS = re.compile(r".*\.journal|.*\.(eval|bench)(\.\d+)?\.json(\.old)?")
"""The names of journals, and of the results of earlier versions, also of those put aside."""

# Not copied: transformers would look for the adapter's weights beside it.
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Output:
    """Where a checkpoint or GGUF file goes, and how it is written and proven.

    Attributes:
        path: the folder or file.
        replace: whether it may replace another one.
        verify: whether it is proven.
        keep_failed: where it is moved if its proof fails; None deletes it.
        dtype: casts the weights of a checkpoint.
        shard_bytes: the size of the largest weight file of a checkpoint; None for the default.
        proof: where the models of a checkpoint's proof run; None chooses.
    """

    path: Path
    replace: bool = False
    verify: bool = True
    keep_failed: Path | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int | None = None
    proof: ProofPlacement | None = None


def require_apart(folder: Path, source: ModelSource) -> None:
    """Check that the dense model is not inside the folder to be written."""
    resolved = folder.resolve()
    if resolved == source.folder or resolved in source.folder.parents:
        raise OutputError(
            f"{folder} contains the source model.", hint="Choose another folder with -o."
        )


def apply_recovered(
    subject: Subject, output: Output, recovery: RecoverySettings, notify: Notify
) -> ApplyResult:
    """Recover the kept blocks, and write the checkpoint with their new values."""
    from sleb_cli.engine.recovery.recover import recover, tasks_ahead  # which imports datasets
    from sleb_cli.engine.recovery.saved_state import delete_states, explain_resume_on_failure

    tasks = [*tasks_ahead(recovery), WEIGHTS_TASK]
    if output.verify:
        tasks.append(PROOF_TASK)
    notify(TasksAhead(tuple(tasks)))
    run_recovery = partial(recover, recovery, notify)
    with explain_resume_on_failure(output.path, notify):
        result = apply_removals(subject, output, notify, run_recovery, recovery.kept_bytes)
    delete_states(output.path)
    return result


def apply_removals(
    subject: Subject,
    output: Output,
    notify: Notify,
    recover: Callable[[], Recovered] | None = None,
    reserved: int = 0,
) -> ApplyResult:
    """Write the pruned checkpoint, complete and proven, or nothing.

    `reserved` bytes stay free for the recovery.
    """
    # Claimed before hours of recovery, so that nobody else writes or heals there.
    with (
        claimed(output.path, replace=output.replace) as aside,
        subject.architecture.source.watch.unchanged(),
    ):
        aside.mkdir()
        planned = plan_files(subject.surgery, output)
        weights_bytes = sum(shard.size for shard in planned.weights.values())
        require_space(output.path, _bytes_of(planned.copies.values()) + weights_bytes + reserved)
        recovered = None
        if recover:
            recovered = recover()
        return _write(subject, aside, output, notify, recovered)


def _write(
    subject: Subject, aside: Path, output: Output, notify: Notify, recovered: Recovered | None
) -> ApplyResult:
    surgery = subject.surgery
    new_values: Mapping[str, Tensor] = {}
    parameters: Mapping[str, Tensor] | None = None
    record: RecoveryRecord | None = None
    if recovered:
        new_values = recovered.tensors
        parameters = recovered.parameters
        record = recovered.record
    planned = plan_files(surgery, output, new_values)
    write_weights(aside, planned.weights, notify)
    for name, text in planned.texts.items():
        (aside / name).write_text(text, encoding="utf-8", newline="\n")
    for name, file in planned.copies.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, aside / name)
    proof = None
    if output.verify:
        placement = output.proof or place_proof(subject.architecture, output.dtype)
        with move_if_proof_fails(aside, output.keep_failed):
            proof = prove(surgery, aside, planned, placement, notify, parameters)
    result = ApplyResult(
        **THIS_VERSION,
        kind="apply",
        model=subject.architecture.record,
        removals=surgery.removals,
        folder=str(output.path),
        blocks=len(surgery.kept.blocks),
        weights_bytes=sum(shard.size for shard in planned.weights.values()),
        **cut_records(surgery.cuts, subject.architecture.source.weights.stored, planned.tensors),
        recovery=record,
        proof=proof,
    )
    _add_card_and_plan(subject, aside, result, notify)
    for cut in surgery.cuts:
        if cut.note:
            notify(Notice(cut.note))
    if planned.left_out:
        what = "files with weights in other formats or of an adapter"
        notify(Notice(f"Did not copy {what}: {', '.join(planned.left_out)}."))
    if planned.outside:
        what = "links that lead outside the model's folder"
        notify(Warned(f"Did not copy {what}: {', '.join(planned.outside)}."))
    return result


def plan_files(
    surgery: Surgery, output: Output, new_values: Mapping[str, Tensor] = MappingProxyType({})
) -> Planned:
    """Decide what the checkpoint will hold; new values are by its tensors' names."""
    source = surgery.architecture.source
    tensors = plan_tensors(surgery, output.dtype, new_values)
    shard_bytes = output.shard_bytes or parse_bytes(DEFAULT_SHARD_SIZE, "--max-shard-size")
    weights = plan_shards(source.weights, tensors, shard_bytes)
    texts = {}
    for name, values in _changed_settings(surgery, output.dtype).items():
        texts[name] = json.dumps(values, indent=2) + "\n"
    replaced = set(texts)
    for cut in surgery.cuts:
        replaced.update(cut.files)
    return Planned(tensors, weights, texts, *_find_other_files(source, replaced))


@contextmanager
def move_if_proof_fails(written: Path, folder: Path | None) -> Iterator[None]:
    """Move the output to `folder`, if there is one, when the proof in this context fails."""
    try:
        yield
    except ProofError as error:
        if folder is None:
            raise
        with writing(
            folder,
            hint=f"The proof failed: {error.message} Choose another place with --keep-failed.",
        ):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if written.is_file():
                folder.mkdir()
            shutil.move(written, folder)
        raise ProofError(
            error.message,
            hint=f"What was written is in {folder}. Do not use it; please report the model.",
        ) from error


def _add_card_and_plan(
    subject: Subject, folder: Path, written: ApplyResult, notify: Notify
) -> None:
    """Write the model card, the plan and its results."""
    plan = subject.plan
    path = folder / CHECKPOINT_PLAN
    # The results are of the plan's removals alone, so they do not describe a checkpoint with
    # further changes.
    has_other_cuts = written.vocabulary or written.experts_per_token
    is_other = written.recovery or has_other_cuts
    described = None if is_other or (plan and plan.recovery) else subject.own_plan
    evaluations: dict[Path, EvalResult] = {}
    benchmarks: dict[Path, BenchResult] = {}
    if subject.file and described:
        evaluations = results_of_plan(EvalResult, subject.file, described, notify)
        benchmarks = results_of_plan(BenchResult, subject.file, described, notify)
    evaluation = join_results(evaluations.values())
    card = model_card(subject, written, evaluation, join_results(benchmarks.values()))
    (folder / CARD).write_text(card, encoding="utf-8")
    if plan:
        changes = {
            "base_model": None if subject.own_plan else written.model,
            "recovery": written.recovery,
            "proof": written.proof,
            "checkpoint": None if has_other_cuts else ModelSource(str(folder), folder).fingerprint,
        }
        changed = plan.model_copy(update=changes)
        path.write_text(to_json(changed.published().to_data()), encoding="utf-8")
    results = results_folder(path)
    for file, result in {**evaluations, **benchmarks}.items():
        results.mkdir(exist_ok=True)
        result.write(results / file.name)


def plan_tensors(
    surgery: Surgery,
    dtype: torch.dtype | None = None,
    new_values: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[NewTensor]:
    """List the tensors of the pruned checkpoint, from the headers of the dense one's files.

    `new_values` take the place of values in the files, by the new names.
    """
    stored = [(tensor.name, tensor) for tensor in surgery.architecture.source.weights.stored]
    tensors = []
    for name, old, slices in surgery.tensors(stored):
        tensors.append(new_tensor(name, old, dtype, slices, new_values.get(name)))
    return tensors


def _changed_settings(surgery: Surgery, dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """Return the contents of changed files by name: config, settings of quantized formats."""
    config = surgery.prune_config()
    if dtype and "torch_dtype" not in config:
        config = {"dtype": None} | config
    config = _with_dtype(config, dtype_name(dtype) if dtype else None)
    folder = surgery.architecture.source.folder
    changed = {CONFIG: map_values(config, _without_folders)}
    for name in SETTINGS:
        if holds_file(folder, name):
            before = read_json(folder / name)
            after = map_values(surgery.settings(name, before), _without_folders)
            if after != before:
                changed[name] = after
    for cut in surgery.cuts:
        for name, values in cut.files.items():
            if values is not None:
                changed[name] = values
    return changed


def _without_folders(key: str, value: Any) -> Any:
    # The checkpoint may be published, so it must not name folders of this machine.
    if isinstance(value, str) and key.endswith("name_or_path"):
        return without_folders(value)
    return value


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Set the data type, or keep it if `dtype` is None, in nested configs too, in one spelling."""
    named = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            named[key] = _with_dtype(value, dtype)
    if "dtype" in named and "torch_dtype" in named:  # of the two, transformers reads `dtype`
        other = named.pop("torch_dtype")
        named["dtype"] = named["dtype"] or other
    for key in ("dtype", "torch_dtype"):
        if dtype and key in named:
            named[key] = dtype
    return named


def _find_other_files(
    source: ModelSource, written: set[str]
) -> tuple[dict[str, Path], list[str], list[str]]:
    """Find the tokenizer, licence, code, and anything else that belongs to the model.

    Returns:
        the files to copy by relative path, the names of weights in other formats, and the names of
        links that lead out of the folder, maybe to private files: neither of them is copied.
    """
    folder = source.folder
    weight_files = {path.relative_to(folder).as_posix() for path in source.weights.paths}
    # Mistral's own format: weights in consolidated.safetensors, settings in params.json.
    in_other_formats = {path.name for path in folder.glob("consolidated*")}
    if in_other_formats:
        in_other_formats.add("params.json")
    in_other_formats.add(_ADAPTER)
    copies: dict[str, Path] = {}
    left_out: list[str] = []
    outside: list[str] = []
    modules = tuple(f"{path}/" for path in source.module_paths)
    for path in _entries(source, _REWRITTEN | written | weight_files):
        inside = path.relative_to(folder).as_posix()
        if links_outside(path, folder):
            outside.append(inside)
        elif path.is_dir():
            if path.parent == folder:
                left_out.append(f"{inside}/")
        elif path.is_file() and not _is_ours(path):
            is_other = other_formats.WEIGHTS.fullmatch(path.name) or inside in in_other_formats
            if inside.startswith(modules) or not is_other:
                copies[inside] = path
            elif inside not in weight_files:
                left_out.append(inside)
    return copies, left_out, outside


def _is_ours(path: Path) -> bool:
    # Plans, results and journals name local folders, and do not describe the pruned model.
    if path.name.endswith(".json"):
        with reading(path), path.open("rb") as file:
            if b'"sleb_version"' in file.read(_START_BYTES):
                return True
    return bool(_RECORDS.fullmatch(path.name))


def _bytes_of(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with reading(file):
            total += file.stat().st_size
    return total


def _entries(source: ModelSource, skipped: set[str]) -> list[Path]:
    """Return the files and links that may belong to the model.

    Folders of its other formats count as a whole.
    """
    folder = source.folder
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in skipped or path.name.endswith(".index.json"):
            continue
        if links_outside(path, folder) or not path.is_dir() or path.name in other_formats.FOLDERS:
            entries.append(path)
        elif (
            path.name in source.module_paths or not (path / "config.json").is_file()
        ):  # another model's
            for file in sorted(path.rglob("*")):
                if not any(name[0] == "." for name in file.relative_to(path).parts):
                    entries.append(file)
    return entries
