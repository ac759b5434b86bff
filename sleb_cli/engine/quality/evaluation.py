"""`sleb eval`: measure texts and tasks on the dense and the pruned models, with paired statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.files.cache import read_cached, write_cached
from sleb_cli.engine.model.generation import with_requires_grad
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.tasks import compare_task
from sleb_cli.engine.quality.texts import description, measure_text
from sleb_cli.engine.text.windows import EvaluationWindows
from sleb_cli.events import Notice, ignore
from sleb_cli.keys import Key
from sleb_cli.names import public_source
from sleb_cli.order import SizeKey
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import (
    EvalResult,
    R,
    TaskResult,
    TextResult,
    merge_results,
    of_sizes,
    size_fields,
)
from sleb_cli.saved_results import find_saved, save_result


@dataclass(frozen=True)
class Evaluation:
    """The models, and the texts and tasks to measure them on.

    Attributes:
        plugins: the versions of other packages that take part.
        batch_size: windows in a batch; None to suit the device.
        show_flips: how many items of each task that only one model gets right are recorded.
        force: whether to measure again, in spite of known results.
    """

    models: Models
    tokenizer: Any
    texts: tuple[EvaluationWindows, ...]
    tasks: tuple[LoadedTask, ...]
    command: str
    plugins: Mapping[str, str]
    batch_size: int | None = None
    show_flips: int = 0
    force: bool = False


def evaluate_models(evaluation: Evaluation, file: Path | None) -> EvalResult:
    """Measure the dense model and each size of the pruned one, on the same data.

    The file keeps each text and task as soon as it is finished. Its results in this setting are not
    measured again.

    Raises:
        DataError: the data of a task is missing or too small.
        ModelError: a loss is not finite, or the model's files have changed meanwhile.
    """
    models = evaluation.models
    whole, group = _without_parts(evaluation), models.group
    known = (
        group.from_main(
            lambda: find_saved(whole, file, ignore) if file and not evaluation.force else None
        )
        or whole
    )
    results_by_part: dict[str, tuple[Any, ...]] = {"texts": (), "tasks": ()}
    reused = list[str]()
    for field, title, results, measure in _jobs(evaluation, known):
        if (sizes := _missing_sizes(results, models.sizes)) is None:
            reused.append(title)
        else:
            results = merge_results(results, measure(sizes))
            if file and group.is_main:
                save_result(whole.model_copy(update={field: results}), file, models.notify)
        results_by_part[field] += tuple(of_sizes(results, models.sizes))
    if reused:
        models.notify(Notice(f"Measured before: {', '.join(reused)}. --force measures again."))
    return whole.model_copy(update=results_by_part)


class _Job(NamedTuple):
    """A text or a task: its field in the result, its title, known results, and the function that
    measures sizes.
    """

    field: str
    title: str
    known: tuple[Any, ...]
    measure: Callable[[Sequence[SizeKey]], tuple[Any, ...]]


def _jobs(evaluation: Evaluation, known: EvalResult) -> Iterator[_Job]:
    for windows in evaluation.texts:
        measure: Any = partial(_run_text, windows, evaluation)
        yield _Job(
            "texts", f"perplexity on {windows.text.source}", _known_text(known, windows), measure
        )
    for task in evaluation.tasks:
        fingerprints = task.fingerprints(evaluation.tokenizer)
        measure = partial(_run_task, task, fingerprints, evaluation)
        yield _Job(
            "tasks", task.name, _known_task(known, fingerprints, evaluation.show_flips), measure
        )


def _without_parts(evaluation: Evaluation) -> EvalResult:
    models = evaluation.models
    architecture, recovered = models.architecture, models.subject.recovered
    return EvalResult(
        **THIS_VERSION,
        kind="eval",
        model=architecture.record,
        **size_fields(models.subject.order),
        behavior=architecture.source.content_hash,
        recovered=recovered.source.content_hash if recovered else None,
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


def _known_text(known: EvalResult, windows: EvaluationWindows) -> tuple[TextResult, ...]:
    expected = description(windows)
    # A published result does not name the folder of its text.
    names = (expected["text"], public_source(expected["text"]))
    results = [
        text.model_copy(update={"text": names[0]}) for text in known.texts if text.text in names
    ]
    return tuple(
        text
        for text in results
        if all(getattr(text, name) == value for name, value in expected.items())
    )[:1]


def _known_task(
    known: EvalResult, fingerprints: dict[str, str], show_flips: int
) -> tuple[TaskResult, ...]:
    results = [
        task
        for task in known.tasks
        if task.fingerprint and task.fingerprint == fingerprints.get(task.task)
    ]
    sizes = [size for task in results for size in task.pruned]
    has_flips = all(
        len(size.flips) >= min(show_flips, (size.lost or 0) + (size.gained or 0)) for size in sizes
    )
    return (
        tuple(results) if has_flips and {task.task for task in results} == {*fingerprints} else ()
    )


def _missing_sizes(known: Sequence[R], sizes: Sequence[SizeKey]) -> tuple[SizeKey, ...] | None:
    # Besides the dense model; None if not even that is missing.
    if not known:
        return tuple(sizes)
    measured = set.intersection(
        *({frozenset(size.removals) for size in result.pruned} for result in known)
    )
    return tuple(size for size in sizes if frozenset(size) not in measured) or None


def _run_text(
    windows: EvaluationWindows, evaluation: Evaluation, sizes: Sequence[SizeKey]
) -> tuple[TextResult]:
    result = measure_text(windows, evaluation.models, sizes, evaluation.batch_size)
    evaluation.models.require_unchanged()
    return (result,)


def _run_task(
    task: LoadedTask,
    fingerprints: dict[str, str],
    evaluation: Evaluation,
    sizes: Sequence[SizeKey],
) -> tuple[TaskResult, ...]:
    models = evaluation.models
    group, key = models.group, _dense_key(evaluation, fingerprints)
    known = None if evaluation.force else group.from_main(lambda: read_cached("answers", key))
    if known:
        models.notify(Notice(f"Using the dense model's answers to {task.name}, from the cache."))
    answers: dict[SizeKey, dict[str, Any]] = {(): known} if known else {}
    missing = [size for size in [(), *sizes] if size not in answers]
    with models.in_turn(missing) if not task.writes else nullcontext() as predictions:
        for removals in missing if predictions else models.loaded_first(missing):
            model = models.without(() if predictions else removals).model
            title = f"{len(removals)} removed" if removals else "dense"
            predict = partial(predictions.logits, removed=removals) if predictions else None
            with with_requires_grad(model):
                answers[removals] = task.run(
                    model, evaluation.tokenizer, title, models.notify, group, predict
                )
    models.require_unchanged()
    if not known and group.is_main:
        write_cached(
            "answers", key, answers[()], f"the dense model's answers to {task.name}", models.notify
        )
    compared = compare_task(
        answers[()], [(removals, answers[removals]) for removals in sizes], evaluation.show_flips
    )
    how = {"limit": task.limit, "lm_eval": version("lm_eval")}
    return tuple(
        result.model_copy(update={"fingerprint": fingerprints.get(result.task), **how})
        for result in compared
    )


def _dense_key(evaluation: Evaluation, fingerprints: dict[str, str]) -> Key:
    # The dense model's answers to a task do not depend on the removal.
    whole = _without_parts(evaluation).model_copy(update={"experts": None, "recovered": None})
    settings = {
        "items": fingerprints,
        "batch_size": evaluation.batch_size,
        "processes": evaluation.models.group.size,
    }
    return {**whole.key, **settings}
