"""`sleb eval`: texts and tasks on the dense model and on those that `apply` writes, with paired statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import choose_device, dtype_name, parse_dtype
from sleb_cli.engine.door.machine import require_one_placement
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.placement import Placement, place_model
from sleb_cli.engine.forward.streaming import weight_bytes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.generation import as_transformers_loads
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.tasks import compare_task, load_requested, versions_behind_lm_eval
from sleb_cli.engine.quality.texts import measure_text
from sleb_cli.engine.quality.written_code import unconfined
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.chat import cut_answers, require_template
from sleb_cli.engine.text.overlap import is_known
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import EvaluationWindows, choose_length, cut_for_evaluation
from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.plan import CHECKPOINT_PLAN, CalibrationRecord, read_plan
from sleb_cli.requests import AUTO, DEFAULT_TEXT, EvalRequest
from sleb_cli.results import EvalResult
from sleb_cli.version import __version__
from sleb_plugins import PlanError, UsageError


def evaluate_subject(subject: Subject, request: EvalRequest, notify: Notify, group: ProcessGroup) -> EvalResult:
    """Measure the dense model and each size of the pruned one, on the same data.

    Raises:
        DataError: a text or a task is missing or too small.
        ModelError: a loss is not finite.
        UsageError: a number is out of range, a streamed model is to run tasks, or two models must fit and do not.
    """
    architecture, placement = subject.architecture, place_evaluation(subject, request, notify, group)
    models = Models(subject, request, placement, group, notify)
    # Read before any model, so that a missing text or a broken task file is reported early.
    tasks = load_requested(request) if request.tasks else ()
    tokenizer = load_tokenizer(architecture.source)
    if any(task.runs_code for task in tasks) and (free := unconfined()):
        notify(Warned(f"On this system, sleb cannot keep programs that the model writes away from {free}."))
    names = texts_of(request)
    texts = group.main_first(lambda: [read_evaluation_text(name, request, tokenizer, architecture) for name in names])
    for sentence in _remarks(texts, subject):
        notify(Notice(sentence))
    batch_size = None if request.items_per_batch == AUTO else int(request.items_per_batch)
    measured = tuple(measure_text(windows, models, batch_size) for windows in texts)
    found = _run_tasks(tasks, models, tokenizer)
    compared = [
        result
        for dense, *pruned in zip(*found.values(), strict=True)
        for result in compare_task(dense, list(zip(models.sizes[1:], pruned, strict=True)), request.show_flips or 0)
    ]
    return EvalResult(
        schema_version=1,
        sleb_version=__version__,
        kind="eval",
        model=architecture.record,
        behavior=architecture.source.content_hash,
        recovered=subject.recovered.source.content_hash if subject.recovered else None,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
        sizes=tuple(models.sizes[1:]),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        processor=processor_name(placement.device),
        texts=measured,
        tasks=tuple(compared),
    )


def place_evaluation(subject: Subject, request: EvalRequest, notify: Notify, group: ProcessGroup) -> Placement:
    """Choose where the models are and in which data type they compute; raises like `evaluate_subject`."""
    if request.stream and request.tasks:
        raise UsageError(
            "--tasks needs the whole model in memory: with --stream, each batch of requests would read it again.",
            hint="Leave out --stream, or measure --perplexity alone. --device-map auto runs tasks, slowly.",
        )
    architecture = subject.architecture
    require_one_placement(request)
    device, device_map = choose_device(request.device or AUTO), request.device_map
    asked, dtype = False if request.tasks else request.stream, request.dtype or AUTO
    reserved = weight_bytes(subject.recovered, parse_dtype(dtype, architecture.dtype)) if subject.recovered else 0
    placement = group.from_main(
        lambda: place_model(architecture, device, dtype, notify, device_map=device_map, stream=asked, reserved=reserved)
    )
    if subject.recovered and (placement.stream or device_map is not None):
        raise UsageError(
            f"The weights of {subject.recovered.source.id} are not the dense model's, so both must fit on one device.",
            hint="Leave out --stream and --device-map, or measure the folder alone: name it instead of its plan.",
        )
    return replace(placement, device=device)


def texts_of(request: EvalRequest) -> tuple[str, ...]:
    """Return the texts that perplexity is measured on."""
    return request.perplexity or (() if request.tasks else (DEFAULT_TEXT,))


def read_evaluation_text(
    name: str, request: EvalRequest, tokenizer: Any, architecture: Architecture
) -> EvaluationWindows:
    """Read a text or conversations and cut them into windows; raises like `evaluate_subject`."""
    length = choose_length(request.sequence_length, architecture)
    text = evaluation_text(name, length)
    if text.conversations:
        require_template(tokenizer, name)
        if request.bos:
            raise UsageError(f"--bos does not apply to conversations, as in {name}.", hint="Leave out --bos.")
        return cut_answers(tokenizer, text, length, request.max_windows)
    return cut_for_evaluation(tokenizer, text, length, bos=request.bos, most=request.max_windows)


def _run_tasks(
    tasks: Sequence[LoadedTask], models: Models, tokenizer: Any
) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """Run each task on each size, one size after another, unless the results are in the cache."""
    versions = versions_behind_lm_eval() if tasks else ""
    fingerprints = {task.name: f"{task.fingerprint()}, packages {versions}" for task in tasks}
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {removals: [] for removals in models.sizes}
    cached = dict.fromkeys(fingerprints)
    for number, removals in enumerate(models.sizes):
        what = "dense" if not removals else f"{len(removals)} removed"
        for task in tasks:
            fingerprint = fingerprints[task.name]
            results = models.group.from_main(partial(models.cached, removals, json.loads, task=fingerprint))
            if results is None:
                model = models.without(removals).model
                with as_transformers_loads([model]):
                    left = len(models.sizes) - number if task.name in cached else 0  # said before the first of them
                    results = task.run(model, tokenizer, what, models.notify, models.group, left)
                models.cache(removals, json.dumps(results).encode(), task=fingerprint)  # may hold NaN
                cached.pop(task.name, None)
            found[removals].append(results)
    if cached:
        models.notify(Notice(f"{', '.join(cached)}: cached; --fresh measures again."))
    return found


def _remarks(texts: list[EvaluationWindows], subject: Subject) -> Iterator[str]:
    """Yield what the user should know about the texts and the model, such as a split that was chosen for them."""
    plan = subject.architecture.source.folder / CHECKPOINT_PLAN
    if subject.plan is None and not subject.surgery.removals and plan.is_file():
        yield f"Measured alone: `sleb eval {plan}` compares it with the dense model."
    if subject.recovered:
        yield f"The pruned model is {subject.recovered.source.id}, with its recovered weights."
    for windows in texts:
        text = windows.text
        if text.split is not None:
            yield f"No split given; measuring perplexity on {text.source}."
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
            yield "The remaining blocks were recovered", plan.recovery.train_text
