"""`sleb eval`: texts and tasks on the dense and the pruned models, with paired statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from sleb_cli.cache import read_cached, write_cached
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.model.generation import with_requires_grad
from sleb_cli.engine.quality.bits_per_byte import ByteWindows, measure_bytes
from sleb_cli.engine.quality.corpus import CorpusTexts, measure_corpus
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.stages import compare_stages, have_same_stages
from sleb_cli.engine.quality.tasks import compare_task
from sleb_cli.engine.quality.texts import description, measure_text
from sleb_cli.engine.text.windows import EvaluationWindows
from sleb_cli.events import Notice, ignore
from sleb_cli.keys import Key
from sleb_cli.names import public_source
from sleb_cli.order import SizeKey
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import (
    ComparedRecord,
    CorpusResult,
    EvalResult,
    StageRecord,
    TaskResult,
    TextResult,
    merge_results,
    part_sizes,
    with_sizes,
)
from sleb_cli.saved_results import find_kept, keep_result


@dataclass(frozen=True)
class Evaluation:
    """The models, and the texts and tasks, or the corpus, to measure them on.

    Attributes:
        task_models: the same models for tasks, whose blocks are not streamed.
        compared: the other model of a comparison.
        by_bytes: texts that its models read in tokens of their own.
        plugins: the versions of other packages that take part.
        batch_size: windows in a batch; None to suit the device.
        show_flips: how many items of each task that only one model gets right are recorded.
        force: whether to measure again, in spite of known results.
    """

    models: Models
    task_models: Models
    texts: tuple[EvaluationWindows, ...]
    tasks: tuple[LoadedTask, ...]
    corpus: CorpusTexts | None
    command: str
    plugins: Mapping[str, str]
    compared: ComparedRecord | None = None
    by_bytes: tuple[tuple[ByteWindows, ByteWindows], ...] = ()
    batch_size: int | None = None
    show_flips: int = 0
    force: bool = False


def evaluate_models(evaluation: Evaluation, folder: Path | None) -> EvalResult:
    """Measure the dense model and each size of the pruned one, on the same data.

    The folder keeps each text and task as soon as it is finished. What it has in this setting is
    not measured again.

    Raises:
        DataError: the data of a task is missing or too small.
        ModelError: a loss is not finite, or the model's files have changed meanwhile.
    """
    run = _Run(evaluation, folder)
    texts: list[TextResult] = []
    for windows in evaluation.texts:
        texts += run.measure_text(windows)
    tasks: list[TaskResult] = []
    for task in evaluation.tasks:
        tasks += run.measure_task(task)
    corpora: tuple[CorpusResult, ...] = ()
    if evaluation.corpus is not None:
        corpora = run.measure_corpus(evaluation.corpus)
    if run.reused:
        text = f"Measured before: {', '.join(run.reused)}. --force measures again."
        evaluation.models.notify(Notice(text))
    results: dict[str, Any] = {"texts": tuple(texts), "tasks": tuple(tasks), "corpora": corpora}
    if evaluation.compared:
        results["compared"] = run.compare(evaluation.compared)
    return run.setting.model_copy(update=results)


class _Run:
    """An evaluation, what is kept of it in `folder`, and the titles of what was reused."""

    def __init__(self, evaluation: Evaluation, folder: Path | None) -> None:
        self.evaluation = evaluation
        self.models = evaluation.models
        self.folder = folder
        self.setting = _setting(evaluation)
        self.reused: list[str] = []
        self.wanted = {frozenset(size) for size in evaluation.models.sizes}

    def measure_text(self, windows: EvaluationWindows) -> tuple[TextResult, ...]:
        """Measure a text, or return its kept result."""
        text = windows.text.source
        # A published result does not name the folder of its text.
        item_key = {"text": description(windows) | {"text": public_source(text)}}
        known: tuple[TextResult, ...] = ()
        for saved in self._find(item_key):
            named = [result.model_copy(update={"text": text}) for result in saved.texts]
            known = merge_results(known, tuple(named))
        missing = self._missing(known, f"perplexity on {text}")
        if missing is not None:
            result = measure_text(windows, self.models, missing, self.evaluation.batch_size)
            self.models.require_unchanged()
            self._keep({"texts": (result,)}, item_key, missing)
            known = merge_results(known, (result,))
        return with_sizes(known, self.wanted)

    def measure_task(self, task: LoadedTask) -> tuple[TaskResult, ...]:
        """Measure a task or group, or return its kept results."""
        fingerprints = task.fingerprints(self.models.tokenizer(()))
        item_key = {"tasks": fingerprints}
        known: tuple[TaskResult, ...] = ()
        for saved in self._find(item_key):
            if _has_flips(saved, self.evaluation.show_flips):
                known = merge_results(known, saved.tasks)
        missing = self._missing(known, task.name)
        if missing is not None:
            results = _run_task(task, fingerprints, self.evaluation, missing)
            self._keep({"tasks": results}, item_key, missing)
            known = merge_results(known, results)
        return with_sizes(known, self.wanted)

    def measure_corpus(self, corpus: CorpusTexts) -> tuple[CorpusResult, ...]:
        """Measure a corpus, or return its kept results."""
        item_key = {"corpus": corpus.description}
        known: tuple[CorpusResult, ...] = ()
        for kept in self._find(item_key):
            known = merge_results(known, kept.corpora)
        missing = self._missing(known, corpus.description["corpus"])
        if missing is not None:
            results = measure_corpus(corpus, self.models, missing, self.evaluation.batch_size)
            self.models.require_unchanged()
            self._keep({"corpora": results}, item_key, missing)
            known = merge_results(known, results)
        return with_sizes(known, self.wanted)

    def compare(self, other: ComparedRecord) -> ComparedRecord:
        """Measure what only a comparison has: bits per byte, and where the models differ."""
        batch_size = self.evaluation.batch_size
        by_bytes = []
        for dense, others in self.evaluation.by_bytes:
            by_bytes.append(measure_bytes(dense, others, self.models, batch_size))
        stages: tuple[StageRecord, ...] = ()
        texts = self.evaluation.texts
        if texts and have_same_stages(*self.models.subject.pair, self.models.notify):
            stages = compare_stages(self.models, texts[0].ids, batch_size)
        self.models.require_unchanged()
        return other.model_copy(update={"bytes": tuple(by_bytes), "stages": stages})

    def _find(self, item_key: Key) -> list[EvalResult]:
        if self.folder is None or self.evaluation.force:
            return []
        find = partial(find_kept, self.setting, item_key, self.folder, ignore)
        return self.models.group.from_main(find)

    def _missing(
        self, known: Sequence[TextResult | TaskResult | CorpusResult], title: str
    ) -> list[SizeKey] | None:
        """Return the sizes that are not known; None if not even the dense model is missing."""
        if not known:
            return list(self.models.sizes)
        missing = []
        for size in self.models.sizes:
            for result in known:
                if frozenset(size) not in {frozenset(scores.removals) for scores in result.pruned}:
                    missing.append(size)
                    break
        if missing:
            return missing
        self.reused.append(title)
        return None

    def _keep(self, results: dict[str, Any], item_key: Key, sizes: Sequence[SizeKey]) -> None:
        if self.folder is not None and self.models.group.is_main:
            result = self.setting.model_copy(update=results | {"sizes": tuple(sizes)})
            keep_result(result, item_key, self.folder, self.models.notify)


def _setting(evaluation: Evaluation) -> EvalResult:
    models = evaluation.models
    architecture = models.architecture
    other = models.subject.other
    return EvalResult(
        **THIS_VERSION,
        kind="eval",
        model=architecture.record,
        parts=part_sizes(models.subject.order),
        behavior=architecture.source.content_hash,
        recovered=other.source.content_hash if other else None,
        compared=evaluation.compared,
        dtype=dtype_name(models.placement.dtype),
        device=models.placement.device.type,
        sizes=models.sizes,
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        plugins=dict(evaluation.plugins),
        commands=(evaluation.command,),
        processor=processor_name(models.placement.device),
        texts=(),
        tasks=(),
    )


def _has_flips(result: EvalResult, count: int) -> bool:
    # Whether a result shows so many of the items that only one model gets right.
    for task in result.tasks:
        for scores in task.pruned:
            flipped = (scores.lost or 0) + (scores.gained or 0)
            if len(scores.flips) < min(count, flipped):
                return False
    return True


def _run_task(
    task: LoadedTask,
    fingerprints: dict[str, str],
    evaluation: Evaluation,
    sizes: Sequence[SizeKey],
) -> tuple[TaskResult, ...]:
    models = evaluation.task_models
    answers: dict[SizeKey, dict[str, Any]] = {}
    key = _dense_key(evaluation, fingerprints)
    known = None
    if not evaluation.force:
        known = models.group.from_main(lambda: read_cached("answers", key))
    if known:
        models.notify(Notice(f"Using the dense model's answers to {task.name}, from the cache."))
        answers[()] = known
    missing = [size for size in [(), *sizes] if size not in answers]
    with nullcontext() if task.writes else models.in_turn(missing) as predictions:
        if predictions is None:
            missing = models.loaded_first(missing)
        for size in missing:
            model = models.without(size if predictions is None else ()).model
            predict = None
            if predictions is not None:
                predict = partial(predictions.logits, removed=size)
            title = models.short_name(size)
            tokenizer = models.tokenizer(size)
            with with_requires_grad(model):
                answers[size] = task.run(
                    model, tokenizer, title, models.notify, models.group, predict
                )
    models.require_unchanged()
    if not known and models.group.is_main:
        what = f"the dense model's answers to {task.name}"
        write_cached("answers", key, answers[()], what, models.notify)
    pruned = [(size, answers[size]) for size in sizes]
    results = []
    other = evaluation.compared
    own_prompts = other is not None and not other.same_chat_template
    shown = evaluation.show_flips
    for result in compare_task(answers[()], pruned, shown, own_prompts=own_prompts):
        changes = {
            "fingerprint": fingerprints.get(result.task),
            "limit": task.limit,
            "lm_eval": version("lm_eval"),
        }
        results.append(result.model_copy(update=changes))
    return tuple(results)


def _dense_key(evaluation: Evaluation, fingerprints: dict[str, str]) -> Key:
    # The dense model's answers to a task do not depend on the removal.
    alone = dict.fromkeys(("parts", "recovered", "compared"))
    whole = _setting(evaluation).model_copy(update=alone)
    return {
        **whole.key,
        "items": fingerprints,
        "batch_size": evaluation.batch_size,
        "processes": evaluation.models.group.size,
    }
