"""Compare the answers of the dense and the pruned models to a task, item by item."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sleb_cli.engine.statistics import (
    Estimate,
    is_binary,
    items_needed,
    mcnemar,
    normal_interval,
    paired_difference,
    wilson_interval,
)
from sleb_cli.results import FlipRecord, PrunedTaskScores, TaskResult, TaskScores, Use
from sleb_plugins import DataError, ModelError

Results = Mapping[str, Any]
"""The results of lm-eval in its `result_schema`, with the samples, as JSON holds them."""


def compare_task(
    dense: Results,
    pruned: Sequence[tuple[tuple[int, ...], Results]],
    show_flips: int = 0,
    *,
    own_prompts: bool = False,
) -> list[TaskResult]:
    """Compare a task's or group's results on the dense and each pruned model, by removals.

    Each metric gives one comparison, for each filter of a task. Up to `show_flips` items that only
    one model gets right are shown. With `own_prompts`, models are asked in different words, such as
    in chat templates of their own.

    Raises:
        DataError: the models were asked different items.
        ModelError: a score is not finite.
    """
    compared = []
    for task, values in dense["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                measure = _Measure(task, metric, filtered)
                _require_same_items(measure, dense, pruned, own_prompts=own_prompts)
                compared.append(_compare(measure, dense, pruned, show_flips))
    return compared


def _require_same_items(
    measure: _Measure,
    dense: Results,
    pruned: Sequence[tuple[tuple[int, ...], Results]],
    *,
    own_prompts: bool,
) -> None:
    names = ["doc_hash", "target_hash"]
    if not own_prompts:
        names.append("prompt_hash")

    asked = [[sample[name] for name in names] for sample in _samples(dense, measure)]
    for _, results in pruned:
        if [[sample[name] for name in names] for sample in _samples(results, measure)] != asked:
            raise DataError(
                f"The items of {measure.task} are not the same for each model.",
                hint="Its prompts may be drawn at random: have the task's code set a seed.",
            )


class _Measure(NamedTuple):
    """A metric of a task or group, after a filter of the answers."""

    task: str
    metric: str
    filter: str


def _compare(
    measure: _Measure,
    dense: Results,
    pruned: Sequence[tuple[tuple[int, ...], Results]],
    show_flips: int,
) -> TaskResult:
    higher_is_better = dense["higher_is_better"].get(measure.task, {}).get(measure.metric)
    lower_is_better = higher_is_better is False
    samples = _samples(dense, measure)
    items = [_hashes(sample) for sample in samples]
    compared = []
    for removals, results in pruned:
        scores = _pruned_scores(measure, dense, results, removals, show_flips)
        if lower_is_better:  # a rise is the loss
            scores = scores.model_copy(update={"lost": scores.gained, "gained": scores.lost})
        compared.append(scores)
    tasks = sorted(_tasks_of(dense, measure.task))
    if not items:  # a group has the items of its tasks
        for task in tasks:
            items += [_hashes(sample) for sample in dense["samples"].get(task, ())]
    shots = {int(dense["n-shot"].get(task, 0) or 0) for task in tasks}
    return TaskResult(
        **measure._asdict(),
        version=str(dense["versions"].get(measure.task)),
        num_fewshot=shots.pop() if len(shots) == 1 else 0,
        chat=bool(dense.get("chat_template")),
        higher_is_better=not lower_is_better,
        doc_ids=tuple(sample["doc_id"] for sample in samples),
        # As lm-eval's `task_hashes`, which joins the samples of all filters, or of all tasks of a
        # group.
        items_sha256=hashlib.sha256("".join(items).encode()).hexdigest() if items else None,
        use=_use(dense["configs"].get(measure.task, {})),
        dense=_scores(dense, measure),
        pruned=tuple(compared),
    )


def _hashes(sample: Mapping[str, Any]) -> str:
    return str(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])


def _use(config: Mapping[str, Any]) -> Use | None:
    if config.get("unsafe_code"):
        return "programs"
    uses: dict[Any, Use] = {"multiple_choice": "choosing", "generate_until": "writing"}
    return uses.get(config.get("output_type"))


def _pruned_scores(
    measure: _Measure, dense: Results, results: Results, removals: tuple[int, ...], show_flips: int
) -> PrunedTaskScores:
    before = _scores(dense, measure)
    after = _scores(results, measure)
    if before.items and after.items:
        change = paired_difference(before.items, after.items)
    else:
        change = _group_difference(measure, dense, results)
    scores = compare_scores(before, after, change, removals)
    flips: list[FlipRecord] = []
    if scores.lost is not None:
        config = dense["configs"].get(measure.task, {})
        samples = zip(_samples(dense, measure), _samples(results, measure), strict=True)
        for pair, old, new in zip(samples, before.items, after.items, strict=True):
            if old != new and len(flips) < show_flips:
                flips.append(_flip(config, measure.metric, *pair))
    return scores.model_copy(update={"flips": tuple(flips)})


def compare_scores(
    before: TaskScores, after: TaskScores, change: Estimate, removals: tuple[int, ...]
) -> PrunedTaskScores:
    """Compare the scores of a pruned model with the dense one's; `change` is their difference."""
    changes = []
    if before.items and after.items:
        changes = [new - old for old, new in zip(before.items, after.items, strict=True)]
    flips: dict[str, Any] = {"mcnemar_p": None, "lost": None, "gained": None}
    if is_binary(before.items) and is_binary(after.items):
        lost = changes.count(-1)
        gained = changes.count(1)
        flips = {"mcnemar_p": mcnemar(lost, gained), "lost": lost, "gained": gained}
    return PrunedTaskScores(
        **dict(after),
        removals=removals,
        retention=after.value / before.value if before.value else None,
        difference=change.mean,
        difference_interval=change.interval,
        standard_error=change.standard_error,
        items_needed=items_needed(stdev(changes)) if len(changes) > 1 else None,
        **flips,
    )


def _samples(results: Results, measure: _Measure) -> list[dict[str, Any]]:
    samples = []
    for sample in results["samples"].get(measure.task, ()):
        if sample["filter"] == measure.filter and measure.metric in sample:
            samples.append(sample)
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _scores(results: Results, measure: _Measure) -> TaskScores:
    values = results["results"][measure.task]
    value = values.get(f"{measure.metric},{measure.filter}")
    if not _is_finite(value):
        raise ModelError(
            f"{measure.metric} of {measure.task} is {value}.", hint="Try --dtype float32."
        )
    scores = [sample[measure.metric] for sample in _samples(results, measure)]
    items: tuple[float, ...] = ()
    if scores and all(map(_is_finite, scores)):
        items = tuple(map(float, scores))
    # Items are kept only if their mean is the value, which it is not for BLEU.
    if items and not math.isclose(fmean(items), value, rel_tol=1e-9, abs_tol=1e-12):
        items = ()
    stderr = values.get(f"{measure.metric}_stderr,{measure.filter}")
    stderr = float(stderr) if _is_finite(stderr) else None
    interval = None
    if is_binary(items):
        interval = wilson_interval(round(sum(items)), len(items))
    elif stderr is not None:
        interval = normal_interval(float(value), stderr)
    return TaskScores(value=float(value), stderr=stderr, interval=interval, items=items)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _group_difference(measure: _Measure, dense: Results, pruned: Results) -> Estimate:
    # A group's mean over its tasks can be estimated from their items; otherwise there is no
    # standard error.
    difference = _scores(pruned, measure).value - _scores(dense, measure).value
    unknown = Estimate(difference, None, None)
    changes = []
    counts = []
    for name in _tasks_of(dense, measure.task):
        task = measure._replace(task=name)
        if f"{measure.metric},{measure.filter}" not in dense["results"][name]:
            continue
        before = _scores(dense, task).items
        after = _scores(pruned, task).items
        if len(before) < 2 or not after:
            return unknown
        changes.append(paired_difference(before, after))
        counts.append(len(before))
    # lm-eval weighs the tasks of a group by their items or alike, and does not tell which.
    for weights in (counts, [1] * len(counts)):
        mean = 0.0
        errors = []
        for weight, change in zip(weights, changes, strict=True):
            share = weight / sum(weights)
            mean += share * change.mean
            errors.append(share * (change.standard_error or 0.0))
        if changes and math.isclose(mean, difference, rel_tol=1e-9, abs_tol=1e-12):
            error = math.hypot(*errors)
            return Estimate(mean, error, normal_interval(mean, error))
    return unknown


def _tasks_of(results: Results, name: str) -> list[str]:
    children = results["group_subtasks"].get(name)
    if children is None:
        return [name]
    tasks = []
    for child in children:
        tasks += _tasks_of(results, child)
    return tasks


def _flip(
    config: Mapping[str, Any], metric: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]
) -> FlipRecord:
    if config.get("output_type") == "multiple_choice":
        prompt, choices, divisors = _choices(config, metric, dense)
        before = choices[_chosen(dense, divisors)]
        after = choices[_chosen(pruned, divisors)]
        target = before if dense[metric] == 1 else after
    else:
        prompt = dense["arguments"][0][0]
        before = _written(dense)
        after = _written(pruned)
        target = dense["target"]
    return FlipRecord(
        doc_id=dense["doc_id"],
        prompt=str(prompt),
        target=str(target),
        dense=before,
        pruned=after,
    )


def _choices(
    config: Mapping[str, Any], metric: str, sample: Mapping[str, Any]
) -> tuple[str, list[str], list[int]]:
    """Return an item's prompt, its choices, and what the metric divides their likelihoods by."""
    requests = sample["arguments"]
    if "acc_mutual_info" in sample["metrics"]:  # the likelihoods without the prompt follow
        requests = requests[: len(requests) // 2]
    # The prompt is the common beginning of an item's choices.
    prompt = os.path.commonprefix([str(context) for context, *_ in requests])  # noqa: RUF071  by characters
    delimiter = str(config.get("target_delimiter", ""))
    choices = []
    divisors = []
    for context, continuation, *_ in requests:
        choice = (str(context)[len(prompt) :] + str(continuation)).strip()
        choices.append(choice)
        if metric == "acc_norm":
            divisors.append(len(str(continuation).removeprefix(delimiter)))
        elif metric == "acc_bytes":
            divisors.append(len(choice.encode()))
        else:
            divisors.append(1)
    return prompt, choices, divisors


def _chosen(sample: Mapping[str, Any], divisors: Sequence[int]) -> int:
    values = []
    for response, divisor in zip(sample["filtered_resps"], divisors, strict=False):
        values.append(float(response[0]) / divisor if divisor else -math.inf)
    return values.index(max(values))


def _written(sample: Mapping[str, Any]) -> str:
    response = sample["filtered_resps"][0]
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
