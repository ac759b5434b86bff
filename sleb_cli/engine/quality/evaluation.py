"""`sleb eval`: perplexity and zero-shot tasks, on the dense model and on the one that `apply` writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name, free_memory
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.overlap import is_known
from sleb_cli.engine.text.sources import Text, evaluation_text
from sleb_cli.engine.text.windows import choose_length, cut_running_text, cut_windows, require_windows, tokens_sha256
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import CHECKPOINT_PLAN, CalibrationRecord, read_plan
from sleb_cli.requests import AUTO, DEFAULT_TEXT, EvalRequest
from sleb_cli.results import EvalResult, ModelScores, PerplexityRecord, TaskRecord
from sleb_cli.version import __version__
from sleb_plugins import DataError, ModelError, PlanError, UsageError
from sleb_plugins.lm_eval_tasks import load_tasks, run_tasks
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# On how many tokens of a window it is checked that the model may be run block by block.
CHECKED_TOKENS = 128


def evaluate_subject(subject: Subject, request: EvalRequest, notify: Notify) -> EvalResult:
    """Measure the dense model and, if blocks are removed, the pruned one, on the same data.

    Raises:
        DataError: a text or a task is missing or too small.
        ModelError: a loss is not finite.
    """
    architecture = subject.architecture
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype or AUTO, architecture.config.dtype, device)
    evaluator = Evaluator(request, architecture)
    for sentence in evaluator.remarks(subject):
        notify(Notice(sentence))
    model = load_dense(architecture, dtype, device, notify)
    dense = evaluator.measure(model, "dense", notify)
    pruned = None
    if subject.surgery.removals:
        # Packed weights cannot be shared, so the dense model is freed before they are loaded again.
        model = None if architecture.is_quantized else model
        free_memory()
        model = load_pruned(subject.surgery, dtype, device, notify, dense=model)
        pruned = evaluator.measure(model, "pruned", notify)
    return EvalResult(
        schema_version=1,
        sleb_version=__version__,
        kind="eval",
        model=architecture.record,
        removals=subject.surgery.removals,
        dtype=dtype_name(dtype),
        device=device.type,
        dense=dense,
        pruned=pruned,
    )


class Evaluator:
    """Measures any number of models, dense or pruned, on the same data, which is read once.

    Raises:
        DataError: a text or a task is missing or too small.
        UsageError: a number is out of range.
    """

    def __init__(self, request: EvalRequest, architecture: Architecture) -> None:
        if request.batch_size < 1 or (request.limit is not None and request.limit < 1):
            raise UsageError("--batch-size and --limit must be 1 or more.", hint="Leave them out for the defaults.")
        self._request = request
        self._architecture = architecture
        self._tasks = _Tasks(request) if request.tasks else None
        self._tokenizer = load_tokenizer(architecture.source)
        names = request.perplexity or (() if request.tasks else (DEFAULT_TEXT,))
        length = choose_length(request.sequence_length, architecture)
        texts = map(evaluation_text, names)
        self._texts = [(text, _windows(text, self._tokenizer, length, bos=request.bos)) for text in texts]

    def remarks(self, subject: Subject) -> Iterator[str]:
        """Yield what to know about the texts: which split was chosen, and which the pruned model was made on."""
        for text, windows in self._texts:
            if text.split is not None:
                yield f"No split was named, so perplexity is measured on {text.source}."
            for what, record in _texts_used(subject):
                if is_known(text, windows, record):
                    yield f"{what} on {record.title}, so perplexity on {text.source} may flatter the pruned model."

    def measure(self, model: Any, what: str, notify: Notify) -> ModelScores:
        """Measure one model, called `what` in progress and errors.

        Raises:
            ModelError: a loss is not finite.
        """
        request, tasks = self._request, self._tasks
        blocks = self._architecture.blocks_of(model)
        with SkippableModel(model, blocks) as skippable:
            perplexities = tuple(
                _perplexity(skippable, what, text, windows, request, notify) for text, windows in self._texts
            )
        return ModelScores(
            blocks=len(blocks),
            perplexities=perplexities,
            tasks=tuple(tasks.run(model, self._tokenizer, what, notify)) if tasks else (),
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


def _windows(text: Text, tokenizer: Any, length: int, *, bos: bool) -> Tensor:
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("--bos does not work: the tokenizer has no BOS token.", hint="Leave out --bos.")
    cut = partial(cut_windows, bos=True) if bos else cut_running_text
    windows = require_windows(cut(tokenizer, text.content, length), text, tokenizer, length)
    return windows[: text.limit]


@torch.inference_mode()
def _perplexity(
    skippable: SkippableModel, what: str, text: Text, windows: Tensor, request: EvalRequest, notify: Notify
) -> PerplexityRecord:
    """Measure the loss of each window: hidden states first, then a slice of logits at a time."""
    losses: list[float] = []
    on_device = windows.to(skippable.model.device)
    passes, _ = prepare_passes(skippable, on_device, notify, batch_size=request.batch_size, checked=CHECKED_TOKENS)
    with task(notify, f"Perplexity on {text.source}, {what}", len(windows), "windows") as advance:
        for number, batch in enumerate(passes.batches):
            losses += dict(passes.scores(NegativeLogLikelihood(), number, (), ()))[BASE]
            advance(len(batch), f"{math.exp(min(sum(losses) / len(losses), 700)):.2f} so far")
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean) or mean > math.log(1e300):
        raise ModelError(f"The loss of the {what} model on {text.source} is {mean}.", hint="Try --dtype float32.")
    return PerplexityRecord(
        text=text.source,
        windows=len(windows),
        sequence_length=windows.shape[1],
        bos=request.bos,
        tokens_sha256=tokens_sha256(windows),
        perplexity=math.exp(mean),
        losses=tuple(losses),
    )


class _Tasks:
    """Zero-shot and few-shot tasks, through lm-eval's Python API on a model in memory."""

    def __init__(self, request: EvalRequest) -> None:
        if request.include_path is not None and not request.include_path.is_dir():
            raise DataError(f"There is no folder {request.include_path}.", hint="Check --include-path.")
        self._request = request
        # Loaded before any model, so that a broken task file is reported early.
        self._manager = load_tasks(request.tasks, request.include_path)

    def run(self, model: Any, tokenizer: Any, what: str, notify: Notify) -> list[TaskRecord]:
        """Evaluate all tasks on one model."""
        request = self._request
        with task(notify, f"{', '.join(request.tasks)}, {what}"):
            results = run_tasks(
                self._manager,
                request.tasks,
                model,
                tokenizer,
                batch_size=request.batch_size,
                limit=request.limit,
                num_fewshot=request.num_fewshot,
            )
        return list(_task_records(results))


def _task_records(results: dict[str, Any]) -> list[TaskRecord]:
    records = []
    for name, values in results["results"].items():
        higher_is_better = results["higher_is_better"].get(name, {})
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            records.append(
                TaskRecord(
                    task=name,
                    metric=metric,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    items=int(results["n-samples"].get(name, {}).get("effective", 0)),
                    num_fewshot=int(results["n-shot"].get(name, 0) or 0),
                    higher_is_better=bool(higher_is_better.get(metric, True)),
                )
            )
    return records
