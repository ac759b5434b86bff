"""The door of `sleb eval`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from sleb_cli.atomic import require_new_file
from sleb_cli.canaries import FOLDER
from sleb_cli.engine.device import choose_device, parse_dtype
from sleb_cli.engine.door.options import Needs, require_one_placement, require_what_they_need
from sleb_cli.engine.door.subject import resolve_subject, sizes, with_recovered
from sleb_cli.engine.forward.placement import Placement, place_model
from sleb_cli.engine.forward.streaming import weight_bytes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.evaluation import Evaluation
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask, find_tasks
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.tasks import PRESETS
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.chat import cut_answers, require_template
from sleb_cli.engine.text.overlap import is_known
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import EvaluationWindows, choose_length, cut_for_evaluation, tokens_sha256
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import CHECKPOINT_PLAN, CalibrationRecord, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import AUTO, DEFAULT_TEXT, EvalRequest
from sleb_cli.units import in_shell
from sleb_plugins import DataError, PlanError, UsageError

_NEED_TASKS: Needs = {
    ("limit", "num_fewshot", "apply_chat_template", "include_path", "run_code", "show_flips"): ("tasks",)
}
_NEED_TEXTS: Needs = {("sequence_length", "max_windows", "bos"): ("perplexity",)}
"""Options that do nothing without texts, of which there is one by default unless there are tasks."""


def resolve_evaluation(request: EvalRequest, registry: Registry, notify: Notify, group: ProcessGroup) -> Evaluation:
    """Check the options, find the plan and the model, and read the texts and tasks; no weight is loaded.

    Raises:
        DataError: a text or a task is missing or too small.
        PlanError: the plan was made for another model.
        UsageError: a number is out of range, a streamed model is to run tasks, or two models must fit and do not.
    """
    if group.is_main and request.output is not None:
        require_new_file(request.output, force=request.force)
    require_one_placement(request)
    require_what_they_need(request, _NEED_TASKS | (_NEED_TEXTS if request.tasks else {}))
    batch_size = _batch_size(request.batch_size)
    subject = group.main_first(lambda: with_recovered(resolve_subject(request, registry, notify), registry, notify))
    placement = _place(subject, request, notify, group)
    models = Models(subject, sizes(subject, request), placement, group, notify)
    tasks = load_requested(request)
    architecture = subject.architecture
    tokenizer = load_tokenizer(architecture.source)
    names = request.perplexity or (() if request.tasks else (DEFAULT_TEXT,))
    texts = group.main_first(lambda: tuple(_read_text(name, request, tokenizer, architecture) for name in names))
    for sentence in _remarks(texts, subject):
        notify(Notice(sentence))
    return Evaluation(models, tokenizer, texts, tasks, batch_size, request.show_flips or 0)


def _batch_size(asked: str | int) -> int | None:
    """Return a number of windows or requests; None to suit the device."""
    if asked == AUTO:
        return None
    if not re.fullmatch(r"[1-9]\d{,11}", str(asked), re.ASCII):
        raise UsageError(f"--batch-size {asked} is not a number of 1 to 999,999,999,999.", hint="Use 8, or auto.")
    return int(asked)


def _place(subject: Subject, request: EvalRequest, notify: Notify, group: ProcessGroup) -> Placement:
    """Choose where the models are and in which data type they compute."""
    if request.stream and request.tasks:
        raise UsageError(
            "--tasks needs the whole model in memory: with --stream, each batch of requests would read it again.",
            hint="Leave out --stream, or measure --perplexity alone. --device-map auto runs tasks, slowly.",
        )
    architecture = subject.architecture
    device, device_map = choose_device(request.device), request.device_map
    stream, dtype = False if request.tasks else request.stream, request.dtype or AUTO
    reserved = weight_bytes(subject.recovered, parse_dtype(dtype, architecture.dtype)) if subject.recovered else 0
    place = partial(place_model, architecture, device, dtype, notify, device_map=device_map, reserved=reserved)
    placement = group.from_main(lambda: place(stream=stream))
    if subject.recovered and (placement.stream or device_map is not None):
        raise UsageError(
            f"The weights of {subject.recovered.source.id} are not the dense model's, so both must fit on one device.",
            hint="Leave out --stream and --device-map, or measure the folder alone: name it instead of its plan.",
        )
    return replace(placement, device=device)


def load_requested(request: EvalRequest) -> tuple[LoadedTask, ...]:
    """Load the tasks that a request names, those of presets in their place.

    Raises:
        DataError: a task or the folder does not exist, or its file or data cannot be read.
        UsageError: a number is out of range.
    """
    if request.include_path is not None and not request.include_path.is_dir():
        raise DataError(f"There is no folder {request.include_path}.", hint="Check --include-path.")
    names = list(dict.fromkeys(name for named in request.tasks for name in PRESETS.get(named, (named,))))
    if not names:
        return ()
    folders = [FOLDER, *([request.include_path] if request.include_path else [])]
    manager = find_tasks(names, folders, also=PRESETS)
    return tuple(
        LoadedTask(
            name,
            manager,
            limit=request.limit,
            num_fewshot=request.num_fewshot,
            chat=request.apply_chat_template,
            batch_size=_batch_size(request.batch_size),
            # As the evaluate library is told.
            run_code=request.run_code or ("confined" if os.environ.get("HF_ALLOW_CODE_EVAL") == "1" else None),
        )
        for name in names
    )


def _read_text(name: str, request: EvalRequest, tokenizer: Any, architecture: Architecture) -> EvaluationWindows:
    """Read a text or conversations and cut them into windows."""
    length = choose_length(request.sequence_length, architecture)
    text = evaluation_text(name, length)
    if not text.conversations:
        return cut_for_evaluation(tokenizer, text, length, bos=request.bos, most=request.max_windows)
    require_template(tokenizer, name)
    if request.bos:
        raise UsageError(f"--bos does not apply to conversations, as in {name}.", hint="Leave out --bos.")
    return cut_answers(tokenizer, text, length, request.max_windows)


def _remarks(texts: Sequence[EvaluationWindows], subject: Subject) -> Iterator[str]:
    """Yield what the user should know about the texts and the model, such as a split that was chosen for them."""
    plan = subject.architecture.source.folder / CHECKPOINT_PLAN
    if subject.plan is None and not subject.surgery.removals and plan.is_file():
        yield f"Measured alone: `sleb eval {in_shell(str(plan))}` compares it with the dense model."
    if subject.recovered:
        yield f"The pruned model is {subject.recovered.source.id}, with its recovered weights."
    for windows in texts:
        text = windows.text
        if text.split is not None:
            yield f"No split given; measuring perplexity on {text.source}."
        for what, record in _texts_used(subject):
            if is_known(text.source, tokens_sha256(windows.ids), record):
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
