"""Resolve a request of `sleb eval`: to models, texts and tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sleb_cli.canaries import FOLDER, LOOPS, PRESETS
from sleb_cli.checks.clashes import given
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.checks.verbs import parse_batch_size
from sleb_cli.engine.device import choose_device, dtype_name, parse_dtype
from sleb_cli.engine.door.compare import (
    choose_shared_length,
    compare_texts,
    describe_other,
    shared_tokens,
    with_other,
)
from sleb_cli.engine.door.named_model import (
    needs_language_head,
    plan_surgeries,
    resolve_subject,
    with_checkpoint,
)
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import count_parameters
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.bits_per_byte import ByteWindows
from sleb_cli.engine.quality.corpus import CorpusTexts, tokenize_corpus
from sleb_cli.engine.quality.evaluation import Evaluation
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask, find_tasks
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.chat import cut_answers, require_template
from sleb_cli.engine.text.overlap import is_known
from sleb_cli.engine.text.passages import passages
from sleb_cli.engine.text.windows import (
    EvaluationWindows,
    cut_for_evaluation,
    follow_text,
    tokens_sha256,
)
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.names import local_path
from sleb_cli.plan import CHECKPOINT_PLAN, CalibrationRecord, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import AUTO, DEFAULT_TEXT, EvalRequest
from sleb_cli.texts.corpus_files import Corpus, read_folder, read_lines
from sleb_cli.texts.local_file import read_file
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import Text
from sleb_cli.units import in_shell
from sleb_plugins import PlanError, UsageError

MANY_PARAMETERS = 1e9
"""A larger model is slow to write on a CPU."""
FEW_ITEMS = 10
"""Of a task whose answers are long, for such a model."""


def resolve_evaluation(
    request: EvalRequest,
    named: NamedSubject,
    sources: tuple[ModelSource, ModelSource | None],
    registry: Registry,
    notify: Notify,
    group: ProcessGroup,
) -> Evaluation:
    """Read the model, texts and tasks; no weight is loaded."""

    def resolve() -> Subject:
        source, other = sources
        subject = resolve_subject(named, source, registry, notify)
        if other:
            return with_other(subject, other, registry, notify)
        return with_checkpoint(subject, registry, notify)

    subject = group.main_first(resolve)
    architecture = subject.architecture
    _require_measurable(request, architecture)
    shared = None
    if subject.compared:
        shared = group.main_first(partial(shared_tokens, subject, request, notify))
    place = partial(_place_models, subject, request, notify, group)
    surgeries = plan_surgeries(subject, named.sizes)
    placement = place(tasks=bool(request.tasks) and not subject.compared)
    models = Models(subject, surgeries, placement, group, notify, shared)
    task_models = models
    if request.tasks and placement.stream:  # two models that do not fit together
        task_models = Models(subject, surgeries, place(tasks=True), group, notify, shared)
    slow = False
    if LOOPS in request.tasks and placement.device.type == "cpu":
        slow = count_parameters(architecture).without(()) > MANY_PARAMETERS
    tasks = load_requested(request, notify, slow=slow)
    tokenizer = models.tokenizer(())
    names = request.perplexity
    length = choose_shared_length(subject, request)
    corpus = None
    if request.corpus is not None:
        read_corpus = partial(_read_corpus, request, tokenizer, architecture, length, notify)
        corpus = group.main_first(read_corpus)
    elif not names and not request.tasks:
        names = (DEFAULT_TEXT,)
    read = partial(_read_text, request, tokenizer, length, notify)
    texts = group.main_first(lambda: tuple(map(read, names)))
    for sentence in _notices(texts, subject):
        notify(Notice(sentence))
    compared = None
    by_bytes: tuple[tuple[ByteWindows, ByteWindows], ...] = ()
    if subject.compared:
        texts, by_bytes = compare_texts(texts, models, request)
        compared = describe_other(subject, shared if texts or not by_bytes else None)
    return Evaluation(
        models=models,
        task_models=task_models,
        compared=compared,
        by_bytes=by_bytes,
        texts=texts,
        tasks=tasks,
        corpus=corpus,
        command=request.command("eval"),
        plugins=registry.behind(family=architecture.record.family),
        batch_size=parse_batch_size(request.batch_size),
        show_flips=request.show_flips or 0,
        force=request.force,
    )


def _require_measurable(request: EvalRequest, architecture: Architecture) -> None:
    """Raise a UsageError if this kind of model has no such measure."""
    name = architecture.source.id
    if architecture.reading is None:
        if request.corpus is not None:
            raise UsageError(
                f"--corpus is for models that only read; {name} is a language model.",
                hint="Use --perplexity or --tasks.",
            )
        return
    hint = "Measure it on texts, or on a folder in BEIR's form: --corpus FILE|FOLDER."
    for option in given(request, "perplexity tasks"):
        raise UsageError(needs_language_head(option, architecture), hint=hint)
    if request.corpus is None:
        raise UsageError(f"{name} only reads, so it has no perplexity.", hint=hint)


def _read_corpus(
    request: EvalRequest, tokenizer: Any, architecture: Architecture, length: int, notify: Notify
) -> CorpusTexts:
    name = str(request.corpus)
    path = local_path(name)
    if path.is_dir():
        corpus = read_folder(name)
    elif path.suffix == ".jsonl":
        corpus = read_lines(name)
    else:
        texts = passages(read_file(name))
        corpus = Corpus(texts, items=texts)
    if corpus.left_out:
        count = f"{corpus.left_out:,} of {corpus.left_out + len(corpus.queries):,} queries"
        notify(Notice(f"{count} of {name} have no judged text and are left out."))
    return tokenize_corpus(name, corpus, architecture, tokenizer, length, request.prompt)


def _place_models(
    subject: Subject, request: EvalRequest, notify: Notify, group: ProcessGroup, *, tasks: bool
) -> Placement:
    architecture = subject.architecture
    device = choose_device(request.device)
    dtype = request.dtype or AUTO
    reserved = 0
    if subject.other:
        if dtype == AUTO and subject.compared:
            dtype = _wider_dtype(architecture, subject.other)
        reserved = model_bytes(subject.other, parse_dtype(dtype, architecture.dtype))
    choose = partial(
        place_model,
        architecture,
        device,
        dtype,
        notify,
        stream=False if tasks else request.stream,
        device_map=request.device_map,
        reserved=reserved,
    )
    placement = group.from_main(choose)
    if subject.checkpoint and (placement.stream or request.device_map is not None):
        raise UsageError(
            f"The weights of {subject.checkpoint.source.id} are not the dense model's, so both "
            "must fit on one device.",
            hint="Leave out --stream and --device-map, or measure the folder alone: name it "
            "instead of its plan.",
        )
    return replace(placement, device=device)


def _wider_dtype(dense: Architecture, other: Architecture) -> str:
    """Return the data type that holds the weights of both models, or auto if it is the same."""
    if dense.dtype is None or other.dtype is None or dense.dtype == other.dtype:
        return AUTO
    return dtype_name(torch.promote_types(dense.dtype, other.dtype))


def load_requested(
    request: EvalRequest, notify: Notify = ignore, *, slow: bool = False
) -> tuple[LoadedTask, ...]:
    """Load the tasks that a request names, itself or by a preset.

    For a `slow` model, the task of long answers has few items unless the request says how many.
    """
    names: dict[str, None] = {}
    for named in request.tasks:
        names |= dict.fromkeys(PRESETS.get(named, (named,)))
    if not names:
        return ()
    folders = [FOLDER]
    if request.include_path is not None:
        folders.append(request.include_path)
    run_code = request.run_code
    # The variable by which Hugging Face's evaluate library is allowed to run code.
    if run_code is None and os.environ.get("HF_ALLOW_CODE_EVAL") == "1":
        run_code = "confined"
    manager = find_tasks(list(names), folders)
    tasks = []
    for name in names:
        limit = request.limit
        if name == LOOPS and slow and limit is None:
            limit = FEW_ITEMS
            notify(
                Notice(
                    f"{name} runs with --limit {limit}: to write all answers, a model of this "
                    f"size takes hours on a CPU. --limit 40 runs all items."
                )
            )
        loaded = LoadedTask(
            name,
            manager,
            limit=limit,
            num_fewshot=request.num_fewshot,
            chat=request.apply_chat_template,
            batch_size=parse_batch_size(request.batch_size),
            run_code=run_code,
        )
        tasks.append(loaded)
    return tuple(tasks)


def _read_text(
    request: EvalRequest, tokenizer: Any, length: int, notify: Notify, name: str
) -> EvaluationWindows:
    with task(notify, f"Reading {name}"):
        text = text_source(name).read_for_evaluation(length)
        if text.conversations:
            require_template(tokenizer, name)
            if request.bos:
                raise UsageError(
                    f"--bos does not apply to conversations, as in {name}.", hint="Leave out --bos."
                )
        if request.sequence_length is not None:
            return _cut(length, notify, text, tokenizer, request)
        cut = partial(_cut, text=text, tokenizer=tokenizer, request=request)
        return follow_text(cut, length, _count_windows, notify)


def _cut(
    length: int, notify: Notify, text: Text, tokenizer: Any, request: EvalRequest
) -> EvaluationWindows:
    if text.conversations:
        return cut_answers(tokenizer, text, length, request.max_windows)
    return cut_for_evaluation(tokenizer, text, length, bos=request.bos, most=request.max_windows)


def _count_windows(windows: EvaluationWindows) -> int:
    return len(windows.ids)


def _notices(texts: Sequence[EvaluationWindows], subject: Subject) -> list[str]:
    """Return notices on the choice of model and text, and on texts the pruned model has seen."""
    notices = []
    plan = subject.architecture.source.folder / CHECKPOINT_PLAN
    alone = subject.plan is None and not subject.surgery.cuts and not subject.other
    if alone and plan.is_file():
        command = f"sleb eval {in_shell(str(plan))}"
        notices.append(
            f"Measured alone. `{command}` compares it with the dense model; if that model is a "
            "folder here, add --model FOLDER."
        )
    if subject.checkpoint:
        name = subject.checkpoint.source.id
        notices.append(f"The pruned model is {name}, with its own weights, not the dense model's.")
    used = _texts_used(subject)
    for windows in texts:
        text = windows.text
        if text.split is not None:
            notices.append(f"No split given; measuring perplexity on {text.source}.")
        for use, record in used:
            if is_known(text.source, tokens_sha256(windows.ids), record):
                notices.append(
                    f"{use} on {record.title}, so perplexity on {text.source} may flatter the "
                    f"pruned model."
                )
    if any(windows.bos == "text" for windows in texts):
        notices.append(
            "This tokenizer begins a text with BOS. As in the literature, only the first window "
            "has it; if the model needs BOS in every window, use --bos."
        )
    return notices


def _texts_used(subject: Subject) -> list[tuple[str, CalibrationRecord]]:
    """Return the texts of the search and recovery, with a clause on each."""
    plans = [] if subject.plan is None else [subject.plan]
    with suppress(PlanError):  # the model need not be a checkpoint of ours
        plans.append(read_plan(subject.architecture.source.folder / CHECKPOINT_PLAN))
    used = []
    for plan in plans:
        used.append((f"{plan.unit.capitalize()} were chosen", plan.calibration))
        if plan.recovery:
            recovered = f"The {plan.order.recovered} were recovered"
            used.append((recovered, plan.recovery.train_text))
    return used
