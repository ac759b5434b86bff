"""lm-eval's tasks on the dense and the pruned models, and how their answers differ, item by item."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from sleb_cli.canaries import CANARIES, FOLDER
from sleb_cli.engine.device import input_device
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import TaskSettings, load_tasks
from sleb_cli.engine.statistics import (
    Estimate,
    items_needed,
    mcnemar,
    normal_interval,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import EvalRequest
from sleb_cli.results import FlipRecord, Interval, PrunedTaskScores, TaskResult, TaskScores
from sleb_plugins import DataError, ModelError
from sleb_plugins.errors import is_out_of_memory

Results = Mapping[str, Any]
"""The results of lm-eval in its `result_schema`, with the samples, as JSON holds them."""

PRESETS: dict[str, tuple[str, ...]] = {
    # The five of Song et al., SLEB (ICML 2024, arXiv:2402.09025); without examples, as lm-eval has them, too.
    "sleb": ("piqa", "winogrande", "hellaswag", "arc_challenge", "arc_easy"),
    # What depth pruning breaks first, in need of no data set: see `sleb_cli/canaries`.
    "canaries": CANARIES,
    # lm-eval's groups for the two Open LLM Leaderboards, with the numbers of examples that each had.
    "leaderboard-v1": ("openllm",),
    "leaderboard-v2": ("leaderboard",),
}
"""Names for several tasks or groups."""


class Tasks:
    """The tasks that a request names, loaded before any model, so that a broken file is reported early.

    Raises:
        DataError: there is no such task or folder, or its file or data cannot be read.
        UsageError: a number is out of range.
    """

    def __init__(self, request: EvalRequest) -> None:
        if request.include_path is not None and not request.include_path.is_dir():
            raise DataError(f"There is no folder {request.include_path}.", hint="Check --include-path.")
        settings = TaskSettings(
            batch_size=request.items_per_batch,
            limit=request.limit,
            num_fewshot=request.num_fewshot,
            apply_chat_template=request.apply_chat_template,
        )
        names = dict.fromkeys(name for named in request.tasks for name in PRESETS.get(named, (named,)))
        folders = [FOLDER] if request.include_path is None else [FOLDER, request.include_path]
        loaded = load_tasks(list(names), folders, settings, also=PRESETS)
        self._tasks = {task.name: task for task in loaded}

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks and groups, those of presets in their place."""
        return tuple(self._tasks)

    def fitting(self, tokenizer: Any, positions: int | None, notify: Notify) -> tuple[str, ...]:
        """Return the names without the canaries that need more positions than the model has, with a notice of each."""
        names = []
        for name in self.names:
            length = self._tasks[name].longest_request(tokenizer) if positions and name in CANARIES else 0
            if positions and length > positions:
                notify(Notice(f"{name} is left out: it takes {length:,} tokens, and the model has {positions:,}."))
            else:
                names.append(name)
        return tuple(names)

    def fingerprint(self, name: str) -> str:
        """Return what the results of a task depend on besides the model and its tokenizer."""
        return f"{self._tasks[name].fingerprint()}, packages {_versions_behind_lm_eval()}"

    def run(
        self, name: str, model: Any, tokenizer: Any, what: str, notify: Notify, group: ProcessGroup | None = None
    ) -> dict[str, Any]:
        """Return lm-eval's results for one task or group on one model, called `what`, with all samples.

        The processes share out the batches of requests.

        Raises:
            UsageError: the task does not fit the model or its tokenizer.
        """
        return self._tasks[name].run(
            model,
            tokenizer,
            lambda total: task(notify, f"{name}, {what}", total, "requests"),
            partial(_share, group) if group and group.size > 1 else None,
            device=input_device(model),
        )


def _share(
    group: ProcessGroup, batches: Sequence[Sequence[int]], answer: Callable[[Sequence[int]], Sequence[Any]]
) -> list[Any]:
    """Have each process answer some of the batches, which hold positions of requests; return all answers in order.

    Raises:
        MemoryError: a batch does not fit into the memory of one of them, so all take smaller ones.
    """
    mine = sorted(position for batch in batches[group.rank :: group.size] for position in batch)
    try:
        found = list(zip(mine, answer(mine), strict=True))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = None
    answers: dict[int, Any] = {}
    for part in group.gather(found):
        if part is None:
            raise MemoryError("out of memory")
        answers |= dict(part)
    return [answers[position] for position in range(len(answers))]


def _versions_behind_lm_eval() -> str:
    """Hash the versions of the packages that lm-eval names, which compute metrics and read answers for it."""
    named = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in importlib.metadata.requires("lm_eval") or ()}
    versions = {}
    for package in sorted(named):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:12]


def compare_task(
    dense: Results, pruned: Sequence[tuple[tuple[int, ...], Results]], show_flips: int = 0
) -> list[TaskResult]:
    """Compare the results of one run of tasks on the dense and each pruned model, named by its removals.

    There is one comparison per metric and filter of each task, and per metric of each group, with up to `show_flips`
    items that only one model gets right.

    Raises:
        DataError: the models did not see the same items.
        ModelError: a metric is not finite.
    """
    for _, results in pruned:
        for name in dense["samples"]:
            _require_same_items(name, dense["samples"][name], results["samples"].get(name, []))
    return [_compare(measure, dense, pruned, show_flips) for measure in _measures(dense)]


@dataclass(frozen=True)
class _Measure:
    """A metric of a task or group, after a filter of the answers."""

    task: str
    metric: str
    filter: str

    @property
    def key(self) -> str:
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class _Scores:
    """A measure of one model: its value, and the samples and scores of the items of which it is the mean, if it is."""

    value: float
    stderr: float | None
    samples: list[dict[str, Any]]
    items: tuple[float, ...]

    @property
    def is_binary(self) -> bool:
        return bool(self.items) and set(self.items) <= {0.0, 1.0}

    @property
    def interval(self) -> Interval | None:
        if self.is_binary:
            return wilson_interval(round(sum(self.items)), len(self.items))
        return None if self.stderr is None else normal_interval(self.value, self.stderr)


def _measures(results: Results) -> Iterator[_Measure]:
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                yield _Measure(name, metric, filtered)


def _compare(
    measure: _Measure, dense: Results, pruned: Sequence[tuple[tuple[int, ...], Results]], show_flips: int
) -> TaskResult:
    before = _scores(dense, measure)
    samples = before.samples
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    higher_is_better = dense["higher_is_better"].get(measure.task, {}).get(measure.metric)
    return TaskResult(
        task=measure.task,
        metric=measure.metric,
        filter=measure.filter,
        version=str(dense["versions"].get(measure.task)),
        num_fewshot=int(dense["n-shot"].get(measure.task) or 0),
        higher_is_better=higher_is_better is not False,
        doc_ids=tuple(sample["doc_id"] for sample in samples),
        # As lm-eval's `task_hashes`, which joins the samples of all filters.
        items_sha256=hashlib.sha256(hashes.encode()).hexdigest() if samples else None,
        dense=TaskScores(value=before.value, stderr=before.stderr, interval=before.interval, items=before.items),
        pruned=tuple(_pruned_scores(measure, dense, results, removals, show_flips) for removals, results in pruned),
    )


def _pruned_scores(
    measure: _Measure, dense: Results, results: Results, removals: tuple[int, ...], show_flips: int
) -> PrunedTaskScores:
    before, after = _scores(dense, measure), _scores(results, measure)
    paired = bool(before.items and after.items)
    is_binary = before.is_binary and after.is_binary
    change = paired_difference(before.items, after.items) if paired else _group_difference(measure, dense, results)
    if change is None:
        change = Estimate(after.value - before.value, None, None)
    pairs = list(zip(before.items, after.items, strict=True)) if is_binary else []
    flips = [n for n, (first, second) in enumerate(pairs) if first != second]
    lost = sum(first > second for first, second in pairs)
    gained = len(flips) - lost
    return PrunedTaskScores(
        value=after.value,
        stderr=after.stderr,
        interval=after.interval,
        items=after.items,
        removals=removals,
        retention=after.value / before.value if before.value else None,
        difference=change.mean,
        standard_error=change.standard_error,
        difference_interval=paired_proportions_interval(lost, gained, len(pairs)) if pairs else change.interval,
        mcnemar_p=mcnemar(lost, gained) if pairs else None,
        lost=lost if pairs else None,
        gained=gained if pairs else None,
        items_needed=_items_needed(before.items, after.items) if paired else None,
        flips=tuple(
            _flip(measure, dense, before.samples[n], after.samples[n], before.items[n] == 1.0)
            for n in flips[:show_flips]
        ),
    )


def _items_needed(before: Sequence[float], after: Sequence[float]) -> int | None:
    differences = [second - first for first, second in zip(before, after, strict=True)]
    return items_needed(stdev(differences)) if len(differences) > 1 else None


def _scores(results: Results, measure: _Measure) -> _Scores:
    values = results["results"][measure.task]
    value, stderr = values[measure.key], values.get(f"{measure.metric}_stderr,{measure.filter}")
    if not _is_number(value) or not math.isfinite(value):
        raise ModelError(f"{measure.metric} of {measure.task} is {value}.", hint="Try --dtype float32.")
    of_task = results["samples"].get(measure.task, [])
    samples = [sample for sample in of_task if sample["filter"] == measure.filter and measure.metric in sample]
    samples.sort(key=lambda sample: int(sample["doc_id"]))
    return _Scores(
        value=float(value),
        stderr=float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
        samples=samples,
        items=_averaged([sample[measure.metric] for sample in samples], value),
    )


def _averaged(scores: list[Any], value: float) -> tuple[float, ...]:
    """Return the scores of the items if their mean is the value; corpus metrics, such as BLEU, have no such scores."""
    if not scores or not all(_is_number(score) and math.isfinite(score) for score in scores):
        return ()
    items = tuple(float(score) for score in scores)
    return items if math.isclose(fmean(items), value, rel_tol=1e-9, abs_tol=1e-12) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _group_difference(measure: _Measure, dense: Results, pruned: Results) -> Estimate | None:
    """Estimate the difference of a group's metric, which is a mean over its tasks, from the items of each.

    Returns None for what is no such mean.
    """
    scores = [
        [_scores(results, _Measure(name, measure.metric, measure.filter)) for results in (dense, pruned)]
        for name in _tasks_of(dense, measure.task)
        if measure.key in dense["results"][name]
    ]
    if not scores or not all(before.items and after.items for before, after in scores):
        return None
    changes = [paired_difference(before.items, after.items) for before, after in scores]
    errors = [change.standard_error for change in changes]
    difference = pruned["results"][measure.task][measure.key] - dense["results"][measure.task][measure.key]
    sizes = [len(before.items) for before, _ in scores]
    # lm-eval weighs the tasks of a group by their items or alike, and does not tell which.
    for weights in (sizes, [1] * len(sizes)):
        shares = [weight / sum(weights) for weight in weights]
        mean = sum(share * change.mean for share, change in zip(shares, changes, strict=True))
        if math.isclose(mean, difference, rel_tol=1e-9, abs_tol=1e-12) and None not in errors:
            error = math.hypot(*(share * (error or 0.0) for share, error in zip(shares, errors, strict=True)))
            return Estimate(mean, error, normal_interval(mean, error))
    return None


def _tasks_of(results: Results, name: str) -> Iterator[str]:
    children = results["group_subtasks"].get(name)
    if children is None:
        yield name
    for child in children or ():
        yield from _tasks_of(results, child)


def _require_same_items(name: str, dense: Sequence[Mapping[str, Any]], pruned: Sequence[Mapping[str, Any]]) -> None:
    """Check by lm-eval's hashes that two models saw the same items.

    Raises:
        DataError: they did not; the message names the first difference.
    """
    first, second = ({(sample["filter"], sample["doc_id"]): sample for sample in of} for of in (dense, pruned))
    hint = "Run it again with --fresh."
    if first.keys() != second.keys():
        raise DataError(f"The dense and the pruned model did not see the same items of {name}.", hint=hint)
    for (_, number), sample in first.items():
        for part, word in (("doc_hash", "content"), ("prompt_hash", "prompt"), ("target_hash", "answer")):
            if sample[part] != second[sample["filter"], number][part]:
                raise DataError(
                    f"Item {number} of {name} did not have the same {word} for the dense and the pruned model.",
                    hint=hint,
                )


def _flip(
    measure: _Measure, results: Results, dense: Mapping[str, Any], pruned: Mapping[str, Any], was_right: bool
) -> FlipRecord:
    """Tell what each model answered to an item that only one gets right."""
    if results["configs"].get(measure.task, {}).get("output_type") == "multiple_choice":
        question = _Question.of(dense, results["configs"][measure.task], measure.metric)
        answers = question.chosen(dense), question.chosen(pruned)
        return FlipRecord(
            doc_id=dense["doc_id"],
            prompt=question.prompt,
            target=answers[0] if was_right else answers[1],
            dense=answers[0],
            pruned=answers[1],
        )
    return FlipRecord(
        doc_id=dense["doc_id"],
        prompt=str(dense["arguments"][0][0]),
        target=str(dense["target"]),
        dense=_written(dense),
        pruned=_written(pruned),
    )


@dataclass(frozen=True)
class _Question:
    """A multiple-choice item: what its choices share, the choices, and by what their likelihoods are divided."""

    prompt: str
    choices: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, sample: Mapping[str, Any], config: Mapping[str, Any], metric: str) -> _Question:
        requests = [(str(context), str(continuation)) for context, continuation, *_ in sample["arguments"]]
        if "acc_mutual_info" in sample["metrics"]:  # the likelihoods without the prompt follow
            requests = requests[: len(requests) // 2]
        first, last = (choose(context for context, _ in requests) for choose in (min, max))
        common = next((n for n, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
        prompt = first[:common]
        delimiter = str(config.get("target_delimiter", ""))
        bare = [continuation.removeprefix(delimiter) for _, continuation in requests]
        return cls(
            prompt=prompt,
            choices=tuple((context[len(prompt) :] + continuation).strip() for context, continuation in requests),
            lengths=tuple(_divisor(choice, metric) for choice in bare),
        )

    def chosen(self, sample: Mapping[str, Any]) -> str:
        """Return the choice that a model finds most likely."""
        likelihoods = [float(response[0]) for response in sample["filtered_resps"][: len(self.choices)]]
        best = max(range(len(self.choices)), key=lambda n: likelihoods[n] / self.lengths[n])
        return self.choices[best]


def _divisor(choice: str, metric: str) -> int:
    return {"acc_norm": len(choice), "acc_bytes": len(choice.encode())}.get(metric, 1)


def _written(sample: Mapping[str, Any]) -> str:
    response = sample["filtered_resps"][0]
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
