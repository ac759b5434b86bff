"""`sleb eval`: texts and tasks on the dense model and on those that `apply` writes, with paired statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from sleb_cli.atomic import to_json
from sleb_cli.engine.device import choose_dtype, dtype_name
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.placement import Placement, device_of, resolve_device_map
from sleb_cli.engine.forward.streaming import choose_to_stream
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.generation import as_transformers_loads
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_files import merge_results, write_lm_eval_results
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.parts import Parts
from sleb_cli.engine.quality.tasks import compare_task, fitting, load_requested, versions_behind_lm_eval
from sleb_cli.engine.quality.texts import measure_texts
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.overlap import is_known
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import EvaluationWindows, choose_length, cut_for_evaluation
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import CHECKPOINT_PLAN, CalibrationRecord, read_plan
from sleb_cli.records import without_folders
from sleb_cli.requests import AUTO, DEFAULT_TEXT, EvalRequest
from sleb_cli.results import EvalResult, TaskResult
from sleb_cli.version import __version__
from sleb_plugins import PlanError, UsageError

LmEvalResults = dict[tuple[int, ...], list[dict[str, Any]]]
"""For each size, lm-eval's own results for each task or group."""


def evaluate_subject(
    subject: Subject, request: EvalRequest, notify: Notify, group: ProcessGroup | None = None
) -> tuple[EvalResult, LmEvalResults]:
    """Measure the dense model and each size of the pruned one, on the same data.

    Raises:
        DataError: a text or a task is missing or too small.
        ModelError: a loss is not finite.
        UsageError: a number is out of range, or a streamed model is to run tasks.
    """
    if request.stream and request.tasks:
        raise UsageError(
            "--tasks needs the whole model in memory: with --stream, each batch of requests would read it again.",
            hint="Leave out --stream, or measure --perplexity alone. --device-map auto runs tasks, slowly.",
        )
    architecture = subject.architecture
    device_map = resolve_device_map(request, architecture)
    device = device_of(device_map, request.device)
    dtype = choose_dtype(request.dtype or AUTO, architecture.dtype, device)
    asked = False if request.tasks else request.stream
    stream = device_map is None and choose_to_stream(architecture, dtype, device, asked, notify)
    models = Models(architecture, subject.sizes(request), Placement(device, dtype, stream, device_map), notify)
    group = group or ProcessGroup()
    parts = Parts(architecture, dtype, device, notify, fresh=request.fresh, can_write=group.is_main)
    # Read before any model, so that a missing text or a broken task file is reported early.
    tasks = load_requested(request) if request.tasks else ()
    tokenizer = load_tokenizer(architecture.source)
    tasks = fitting(tasks, tokenizer, architecture.longest_sequence, notify) if tasks else ()
    texts = group.one_first(lambda: read_texts(request, architecture, tokenizer))
    for sentence in _remarks(texts, subject):
        notify(Notice(sentence))
    batch_size = None if request.items_per_batch == AUTO else int(request.items_per_batch)
    measured = measure_texts(texts, models, parts, batch_size, group, notify)
    found = _run_tasks(tasks, models, parts, tokenizer, group, notify)
    result = EvalResult(
        schema_version=1,
        sleb_version=__version__,
        kind="eval",
        model=architecture.record,
        behavior=architecture.source.behavior,
        dtype=dtype_name(dtype),
        device=device.type,
        sizes=tuple(models.sizes[1:]),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        processor=processor_name(device),
        texts=measured,
        tasks=tuple(_compare_tasks(found, request.show_flips or 0)),
    )
    return result, found


def _compare_tasks(found: LmEvalResults, show_flips: int) -> Iterator[TaskResult]:
    for dense, *pruned in zip(*found.values(), strict=True):
        yield from compare_task(dense, list(zip(list(found)[1:], pruned, strict=True)), show_flips)


def read_texts(request: EvalRequest, architecture: Architecture, tokenizer: Any) -> list[EvaluationWindows]:
    """Read the texts and cut them into windows.

    Raises:
        DataError: a text is missing or too short.
        UsageError: a number is out of range.
    """
    names = request.perplexity or (() if request.tasks else (DEFAULT_TEXT,))
    length = choose_length(request.sequence_length, architecture)
    texts = (evaluation_text(name) for name in names)
    return [
        cut_for_evaluation(tokenizer, text, length, bos=request.bos, stride=request.stride, most=request.max_windows)
        for text in texts
    ]


def _run_tasks(
    tasks: Sequence[LoadedTask], models: Models, parts: Parts, tokenizer: Any, group: ProcessGroup, notify: Notify
) -> LmEvalResults:
    """Run each task on each size, one size after another, unless the results are in the cache."""
    versions = versions_behind_lm_eval() if tasks else ""
    fingerprints = {task.name: f"{task.fingerprint()}, packages {versions}" for task in tasks}
    found: LmEvalResults = {}
    measured = set()
    for removals in models.sizes:
        what = "dense" if not removals else f"{len(removals)} removed"
        found[removals] = []
        for task in tasks:
            key = {"removals": ",".join(map(str, sorted(removals))), "task": fingerprints[task.name]}
            results = group.from_main(partial(parts.read, key, json.loads))
            if results is None:
                model = models.without(removals).model
                with as_transformers_loads([model]):
                    results = task.run(model, tokenizer, what, notify, group)
                parts.write(key, to_json(results).encode())
                measured.add(task.name)
            found[removals].append(results)
    if cached := [task.name for task in tasks if task.name not in measured]:
        notify(Notice(f"{', '.join(cached)}: cached; --fresh measures again."))
    return found


def write_by_lm_eval(beside: Path, found: LmEvalResults, subject: Subject) -> tuple[str, ...]:
    """Write what lm-eval's own command would, into a folder next to this file; return the names of the files.

    Raises:
        OutputError: they cannot be written.
    """
    folder = beside.with_suffix(".lm-eval")
    names = []
    for removals, results in found.items():
        size = folder / (f"{len(removals)}-removed" if removals else "dense")
        files = write_lm_eval_results(size, merge_results(results), _model_args(removals, subject))
        names += [str(file.relative_to(beside.parent)) for file in files]
    return tuple(names)


def _model_args(removals: tuple[int, ...], subject: Subject) -> dict[str, Any]:
    """Return the arguments of lm-eval's `--model sleb` for this size, without local folders."""
    if removals and subject.file is not None:
        return {"plan": subject.file.name, "remove": len(removals)}
    blocks = {"blocks": "+".join(map(str, removals))} if removals else {}
    return {"model": without_folders(subject.architecture.source.id)} | blocks


def _remarks(texts: list[EvaluationWindows], subject: Subject) -> Iterator[str]:
    """Yield what the user should know about the texts, such as a split that was chosen for them."""
    for windows in texts:
        text = windows.text
        if text.split is not None:
            yield f"No split was named, so perplexity is measured on {text.source}."
        for what, record in _texts_used(subject):
            if is_known(text, windows.ids, record):
                yield f"{what} on {record.title}, so perplexity on {text.source} may flatter the pruned model."
    if any(windows.bos == "text" for windows in texts):
        yield (
            "This tokenizer begins a text with BOS. As in the literature, only the first window has it; if the model "
            "needs BOS in every window, use --bos."
        )


def _texts_used(subject: Subject) -> Iterator[tuple[str, CalibrationRecord]]:
    """Yield the texts that the pruned model was made on, or the checkpoint that is measured as a model."""
    plans = [] if subject.plan is None else [subject.plan]
    with suppress(PlanError):  # no checkpoint of ours
        plans.append(read_plan(subject.architecture.source.folder / CHECKPOINT_PLAN))
    for plan in plans:
        yield "Blocks were chosen", plan.calibration
        if plan.recovery:
            yield "The remaining blocks were recovered", plan.recovery.text
