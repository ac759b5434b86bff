"""`sleb eval`: texts and tasks on the dense model and on those that `apply` writes, with paired statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.files.cache import find_cached, keep_cached
from sleb_cli.engine.model.generation import as_transformers_loads
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.tasks import compare_task
from sleb_cli.engine.quality.texts import description, measure_text
from sleb_cli.engine.text.windows import EvaluationWindows
from sleb_cli.events import Notice, ignore
from sleb_cli.kept_results import find_kept, keep_result
from sleb_cli.keys import Key
from sleb_cli.names import public_source
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import EvalResult, R, Removals, TaskResult, TextResult, merge_results, of_sizes


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on which models.

    `batch_size` counts the windows of a batch; None to suit the device. Up to `show_flips` items of each task that only
    one model gets right are recorded. `force` measures anew what was measured before. `command` asked for it, and
    `plugins` has the versions of other packages that take part.
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


def evaluate_models(asked: Evaluation, file: Path | None) -> EvalResult:
    """Measure the dense model and each size of the pruned one, on the same data.

    A file keeps each text and each task when it is finished. What it holds in this setting is not measured again.

    Raises:
        DataError: the data of a task is missing or too small.
        ModelError: a loss is not finite, or the model's files have changed meanwhile.
    """
    models = asked.models
    whole, group = _without_parts(asked), models.group
    known = group.from_main(lambda: find_kept(whole, file, ignore) if file and not asked.force else None) or whole
    found: dict[str, tuple[Any, ...]] = {"texts": (), "tasks": ()}
    reused = list[str]()
    for part, name, results, run in _work(asked, known):
        if (sizes := _missing_sizes(results, models.sizes)) is None:
            reused.append(name)
        else:
            results = merge_results(results, run(sizes))
            if file and group.is_main:
                keep_result(whole.model_copy(update={part: results}), file, models.notify)
        found[part] += tuple(of_sizes(results, models.sizes))
    if reused:
        models.notify(Notice(f"Measured before: {', '.join(reused)}. --force measures again."))
    return whole.model_copy(update=found)


def _work(asked: Evaluation, known: EvalResult) -> Iterator[tuple[str, str, Any, Callable[[Sequence[Removals]], Any]]]:
    """Yield for each text and each task its field in the result, its name, what is known, and what measures sizes."""
    for windows in asked.texts:
        run: Any = partial(_run_text, windows, asked)
        yield "texts", f"perplexity on {windows.text.source}", _known_text(known, windows), run
    for task in asked.tasks:
        fingerprints = task.fingerprints()
        run = partial(_run_task, task, fingerprints, asked)
        yield "tasks", task.name, _known_task(known, fingerprints, asked.show_flips), run


def _without_parts(asked: Evaluation) -> EvalResult:
    models = asked.models
    architecture, recovered = models.architecture, models.subject.recovered
    return EvalResult(
        **THIS_VERSION,
        kind="eval",
        model=architecture.record,
        experts=models.subject.experts,
        behavior=architecture.source.content_hash,
        recovered=recovered.source.content_hash if recovered else None,
        dtype=dtype_name(models.placement.dtype),
        device=models.placement.device.type,
        sizes=models.sizes,
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        plugins=dict(asked.plugins),
        commands=(asked.command,),
        processor=processor_name(models.placement.device),
        texts=(),
        tasks=(),
    )


def _known_text(known: EvalResult, windows: EvaluationWindows) -> tuple[TextResult, ...]:
    """Return what is known of these windows; in a checkpoint, results do not name the folders of texts."""
    asked = description(windows)
    names = (asked["text"], public_source(asked["text"]))
    found = [text.model_copy(update={"text": names[0]}) for text in known.texts if text.text in names]
    return tuple(text for text in found if all(getattr(text, name) == value for name, value in asked.items()))[:1]


def _known_task(known: EvalResult, fingerprints: dict[str, str], show_flips: int) -> tuple[TaskResult, ...]:
    """Return what is known of a task or group, if it is complete."""
    found = [task for task in known.tasks if task.fingerprint and task.fingerprint == fingerprints.get(task.task)]
    sizes = [size for task in found for size in task.pruned]
    has_flips = all(len(size.flips) >= min(show_flips, (size.lost or 0) + (size.gained or 0)) for size in sizes)
    return tuple(found) if has_flips and {task.task for task in found} == {*fingerprints} else ()


def _missing_sizes(known: Sequence[R], sizes: Sequence[Removals]) -> tuple[Removals, ...] | None:
    """Return the sizes that are to be measured besides the dense model; None if nothing is."""
    if not known:
        return tuple(sizes)
    there = set.intersection(*({frozenset(size.removals) for size in result.pruned} for result in known))
    return tuple(size for size in sizes if frozenset(size) not in there) or None


def _run_text(windows: EvaluationWindows, asked: Evaluation, sizes: Sequence[Removals]) -> tuple[TextResult]:
    """Measure a text on the dense model and on these sizes."""
    found = measure_text(windows, asked.models, sizes, asked.batch_size)
    asked.models.require_unchanged()
    return (found,)


def _run_task(
    task: LoadedTask, fingerprints: dict[str, str], asked: Evaluation, sizes: Sequence[Removals]
) -> tuple[TaskResult, ...]:
    """Run a task on the dense model and on these sizes."""
    models = asked.models
    group, key = models.group, _dense_key(asked, fingerprints)
    known = None if asked.force else group.from_main(lambda: find_cached("answers", key))
    if known:
        models.notify(Notice(f"Using the dense model's answers to {task.name}, from the cache."))
    found: dict[Removals, dict[str, Any]] = {(): known} if known else {}
    missing = [size for size in [(), *sizes] if size not in found]
    with models.in_turn(missing) if not task.writes else nullcontext() as predictions:
        for removals in missing if predictions else models.loaded_first(missing):
            model = models.without(() if predictions else removals).model
            what = f"{len(removals)} removed" if removals else "dense"
            predict = partial(predictions.logits, removed=removals) if predictions else None
            with as_transformers_loads(model):
                found[removals] = task.run(model, asked.tokenizer, what, models.notify, group, predict)
    models.require_unchanged()
    if not known and group.is_main:
        keep_cached("answers", key, found[()], f"the dense model's answers to {task.name}", models.notify)
    compared = compare_task(found[()], [(removals, found[removals]) for removals in sizes], asked.show_flips)
    how = {"limit": task.limit, "lm_eval": version("lm_eval")}
    return tuple(result.model_copy(update={"fingerprint": fingerprints.get(result.task), **how}) for result in compared)


def _dense_key(asked: Evaluation, fingerprints: dict[str, str]) -> Key:
    """Return what the dense model's answers to a task depend on, and nothing of what is removed."""
    whole = _without_parts(asked).model_copy(update={"experts": None, "recovered": None})
    how = {"items": fingerprints, "batch_size": asked.batch_size, "processes": asked.models.group.size}
    return {**whole.key, **how}
