"""Compare the answers of the dense and the pruned models to a task, item by item."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sleb_cli.canaries import CANARIES
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

PRESETS: dict[str, tuple[str, ...]] = {
    # The five of Song et al., SLEB (ICML 2024, arXiv:2402.09025), without examples, which is
    # lm-eval's default.
    "sleb": ("piqa", "winogrande", "hellaswag", "arc_challenge", "arc_easy"),
    # What depth pruning breaks first; they need no data set: see `sleb_cli/canaries`.
    "canaries": CANARIES,
    # lm-eval's groups for the two Open LLM Leaderboards, with the leaderboards' numbers of
    # examples.
    "leaderboard-v1": ("openllm",),
    "leaderboard-v2": ("leaderboard",),
}
"""Names for several tasks or groups."""


def compare_task(
    dense: Results, pruned: Sequence[tuple[tuple[int, ...], Results]], show_flips: int = 0
) -> list[TaskResult]:
    """Compare the results of a task or group on the dense and each pruned model, named by its
    removals.

    Each metric gives one comparison, for each filter of a task. Up to `show_flips` items that only
    one model gets right are shown.
    """
    return [_compare(measure, dense, pruned, show_flips) for measure in _measures(dense)]


class _Measure(NamedTuple):
    """A metric of a task or group, after a filter of the answers."""

    task: str
    metric: str
    filter: str


def _measures(results: Results) -> Iterator[_Measure]:
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield _Measure(name, metric, filtered)


def _compare(
    measure: _Measure,
    dense: Results,
    pruned: Sequence[tuple[tuple[int, ...], Results]],
    show_flips: int,
) -> TaskResult:
    for _, results in pruned:
        if _item_hashes(results, measure) != _item_hashes(dense, measure):
            raise DataError(
                f"The items of {measure.task} are not the same for each model.",
                hint="Its prompts may be drawn at random: have the task's code set a seed.",
            )
    samples = _samples(dense, measure)
    tasks = sorted(_tasks_of(dense, measure.task))
    seen = samples or [sample for name in tasks for sample in dense["samples"].get(name, ())]
    shots = {int(dense["n-shot"].get(name, 0) or 0) for name in tasks}
    hashes = "".join(
        sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in seen
    )
    return TaskResult(
        **measure._asdict(),
        version=str(dense["versions"].get(measure.task)),
        num_fewshot=shots.pop() if len(shots) == 1 else 0,
        chat=bool(dense.get("chat_template")),
        higher_is_better=dense["higher_is_better"].get(measure.task, {}).get(measure.metric)
        is not False,
        doc_ids=tuple(sample["doc_id"] for sample in samples),
        # As lm-eval's `task_hashes`, which joins the samples of all filters, or of all tasks of a
        # group.
        items_sha256=hashlib.sha256(hashes.encode()).hexdigest() if seen else None,
        use=_use(dense["configs"].get(measure.task, {})),
        dense=_scores(dense, measure),
        pruned=tuple(
            _pruned_scores(measure, dense, results, removals, show_flips)
            for removals, results in pruned
        ),
    )


def _item_hashes(results: Results, measure: _Measure) -> list[tuple[str, str, str]]:
    return [
        (sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
        for sample in _samples(results, measure)
    ]


def _use(config: Mapping[str, Any]) -> Use | None:
    if config.get("unsafe_code"):
        return "programs"
    uses: dict[Any, Use] = {"multiple_choice": "choosing", "generate_until": "writing"}
    return uses.get(config.get("output_type"))


def _pruned_scores(
    measure: _Measure, dense: Results, results: Results, removals: tuple[int, ...], show_flips: int
) -> PrunedTaskScores:
    before, after = _scores(dense, measure), _scores(results, measure)
    paired = bool(before.items and after.items)
    change = (
        paired_difference(before.items, after.items)
        if paired
        else _group_difference(measure, dense, results)
    )
    changes = (
        [new - old for old, new in zip(before.items, after.items, strict=True)] if paired else []
    )
    flips: dict[str, Any] = {"mcnemar_p": None, "lost": None, "gained": None}
    if is_binary(before.items) and is_binary(after.items):
        lost, gained = changes.count(-1), changes.count(1)
        items = zip(_samples(dense, measure), _samples(results, measure), changes, strict=True)
        flipped = [(old, new) for old, new, change in items if change][:show_flips]
        flips = {
            "mcnemar_p": mcnemar(lost, gained),
            "lost": lost,
            "gained": gained,
            "flips": tuple(
                _flip(dense["configs"].get(measure.task, {}), measure.metric, *pair)
                for pair in flipped
            ),
        }
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
    of_task = results["samples"].get(measure.task, [])
    samples = [
        sample
        for sample in of_task
        if sample["filter"] == measure.filter and measure.metric in sample
    ]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _scores(results: Results, measure: _Measure) -> TaskScores:
    values = results["results"][measure.task]
    value, stderr = (
        values.get(f"{measure.metric}{suffix},{measure.filter}") for suffix in ("", "_stderr")
    )
    if not _is_finite(value):
        raise ModelError(
            f"{measure.metric} of {measure.task} is {value}.", hint="Try --dtype float32."
        )
    scores = [sample[measure.metric] for sample in _samples(results, measure)]
    items = tuple(map(float, scores)) if all(map(_is_finite, scores)) else ()
    # Items are kept only if their mean is the value, which it is not for BLEU.
    if not items or not math.isclose(fmean(items), value, rel_tol=1e-9, abs_tol=1e-12):
        items = ()
    stderr = float(stderr) if _is_finite(stderr) else None
    interval = None if stderr is None else normal_interval(float(value), stderr)
    if is_binary(items):
        interval = wilson_interval(round(sum(items)), len(items))
    return TaskScores(value=float(value), stderr=stderr, interval=interval, items=items)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _group_difference(measure: _Measure, dense: Results, pruned: Results) -> Estimate:
    # A group's mean over its tasks can be estimated from their items; otherwise there is no
    # standard error.
    difference = _scores(pruned, measure).value - _scores(dense, measure).value
    tasks = [measure._replace(task=name) for name in _tasks_of(dense, measure.task)]
    items = [
        (_scores(dense, task).items, _scores(pruned, task).items) for task in tasks
        if f"{measure.metric},{measure.filter}" in dense["results"][task.task]
    ]  # fmt: skip
    if items and all(len(before) > 1 and after for before, after in items):
        changes = [paired_difference(before, after) for before, after in items]
        # lm-eval weighs the tasks of a group by their items or alike, and does not tell which.
        for weights in ([len(before) for before, _ in items], [1] * len(items)):
            shares = [weight / sum(weights) for weight in weights]
            mean = sum(share * change.mean for share, change in zip(shares, changes, strict=True))
            if math.isclose(mean, difference, rel_tol=1e-9, abs_tol=1e-12):
                errors = [change.standard_error or 0.0 for change in changes]
                error = math.hypot(
                    *(share * error for share, error in zip(shares, errors, strict=True))
                )
                return Estimate(mean, error, normal_interval(mean, error))
    return Estimate(difference, None, None)


def _tasks_of(results: Results, name: str) -> Iterator[str]:
    children = results["group_subtasks"].get(name)
    if children is None:
        yield name
    for child in children or ():
        yield from _tasks_of(results, child)


def _flip(
    config: Mapping[str, Any], metric: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]
) -> FlipRecord:
    if config.get("output_type") == "multiple_choice":
        prompt, answers = _chosen(config, metric, dense, pruned)
        target = answers[0 if dense[metric] == 1 else 1]
    else:
        prompt, target, answers = (
            dense["arguments"][0][0],
            dense["target"],
            [_written(dense), _written(pruned)],
        )
    return FlipRecord(
        doc_id=dense["doc_id"],
        prompt=str(prompt),
        target=str(target),
        dense=answers[0],
        pruned=answers[1],
    )


def _chosen(
    config: Mapping[str, Any], metric: str, *samples: Mapping[str, Any]
) -> tuple[str, list[str]]:
    # The prompt is the common beginning of an item's choices.
    requests = [
        (str(context), str(continuation)) for context, continuation, *_ in samples[0]["arguments"]
    ]
    if "acc_mutual_info" in samples[0]["metrics"]:  # the likelihoods without the prompt follow
        requests = requests[: len(requests) // 2]
    prompt = os.path.commonprefix([context for context, _ in requests])  # noqa: RUF071  by characters
    choices = [
        (context[len(prompt) :] + continuation).strip() for context, continuation in requests
    ]
    bare = [
        continuation.removeprefix(str(config.get("target_delimiter", "")))
        for _, continuation in requests
    ]
    lengths = {
        "acc_norm": list(map(len, bare)),
        "acc_bytes": [len(choice.encode()) for choice in bare],
    }
    divisors = lengths.get(metric, [1] * len(bare))

    def chosen(sample: Mapping[str, Any]) -> str:
        likelihoods = [float(response[0]) for response in sample["filtered_resps"][: len(choices)]]
        values = [
            value / length if length else -math.inf
            for value, length in zip(likelihoods, divisors, strict=True)
        ]
        return choices[max(range(len(choices)), key=values.__getitem__)]

    return prompt, [chosen(sample) for sample in samples]


def _written(sample: Mapping[str, Any]) -> str:
    response = sample["filtered_resps"][0]
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
