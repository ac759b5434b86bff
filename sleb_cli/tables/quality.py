"""What does a removal cost, on texts and on tasks?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from sleb_cli.names import public_source
from sleb_cli.order import SizeKey
from sleb_cli.results import (
    DivergenceRecord,
    Interval,
    PrunedTextScores,
    TaskResult,
    TextResult,
    main_metric,
)
from sleb_cli.tables.table import PERPLEXITY, Columns, Scored, Table, between, model_name, tabulate
from sleb_cli.units import (
    format_change,
    format_perplexity,
    format_probability,
    format_share,
    plural,
)

Estimate = tuple[float, Interval | None]
"""A number, with its 95% interval if it has one."""

ENOUGH = 0.95
"""The share of the dense model's scores that counts as kept."""

_MAX_POSSIBLE_LOSS = 0.25
"""If the interval allows a greater loss, there were too few items to tell."""

_BOS = {"none": "no BOS", "text": "BOS before the text", "windows": "BOS in each"}


def perplexity_change(scores: PrunedTextScores) -> Estimate:
    """Return the relative change of a text's perplexity."""
    ends = scores.interval
    interval = Interval(low=math.expm1(ends.low), high=math.expm1(ends.high)) if ends else None
    return math.expm1(scores.log_ratio), interval


def text_names(
    texts: Sequence[TextResult], remarks_on: Callable[[TextResult], list[str]] = lambda text: []
) -> list[str]:
    """Name each text, with remarks that tell texts of one name apart."""
    details = [
        (
            f"windows of {text.sequence_length:,}", _BOS[text.bos], f"{text.windows:,} of them",
            f"tokens {text.tokens_sha256[:8]}",
        )
        for text in texts
    ]  # fmt: skip
    names, public = list[str](), [public_source(text.text) for text in texts]
    for text, name, row in zip(texts, public, details, strict=True):
        namesakes = [
            other for other_name, other in zip(public, details, strict=True) if other_name == name
        ]
        differing = [len(set(column)) > 1 for column in zip(*namesakes, strict=True)]
        remarks = ["answers"] * (text.clustered_by == "conversations")
        remarks += [
            detail for detail, differs in zip(row, differing, strict=True) if detail and differs
        ]
        remarks += remarks_on(text)
        names.append(name + (f" ({', '.join(remarks)})" if remarks else ""))
    return names


def task_name(task: TaskResult) -> str:
    """Name a task with its metric: piqa, acc, 5-shot, chat."""
    details = [
        task.metric,
        task.filter if task.filter != "none" else "",
        f"{task.num_fewshot}-shot" if task.num_fewshot else "",
        "chat" if task.chat else "",
        "" if task.higher_is_better else "lower is better",
    ]
    return ", ".join([task.task, *filter(None, details)])


def task_names(tasks: Sequence[TaskResult]) -> list[str]:
    """Name each task, with its number of items, or their hash, if it was run on several sets of
    them.
    """
    names = list(map(task_name, tasks))
    # A group has no items of its own, but a hash of its tasks' items.
    items = [
        plural(len(task.doc_ids), "item") if task.doc_ids else f"items {task.items_sha256}"[:14]
        for task in tasks
    ]
    names = [
        f"{name}, {count}" if names.count(name) > 1 else name
        for name, count in zip(names, items, strict=True)
    ]
    hashes = [f" {task.items_sha256}"[:9] for task in tasks]
    return [
        name + digits if names.count(name) > 1 else name
        for name, digits in zip(names, hashes, strict=True)
    ]


def perplexities(scored: Iterable[Scored]) -> Table:
    """List the perplexity of each text on each model."""
    columns: Columns = [
        ("text", str), ("model", str), ("perplexity", format_perplexity), ("change", format_change),
        ("95%", partial(between, form=format_change)),
    ]  # fmt: skip
    rows = []
    for name, model, scores in scored:
        change = perplexity_change(scores) if isinstance(scores, PrunedTextScores) else (None, None)
        rows.append([name, model, scores.perplexity, *change])
    compared = any(row[3] is not None for row in rows)
    notes = [
        PERPLEXITY,
        *["95%: interval of the change; both models read the same tokens."] * compared,
    ]
    return tabulate("Perplexity", columns, rows, notes)


def divergences(scored: Iterable[Scored]) -> Table:
    """List the divergence of the predictions from the dense model's."""
    precise = "{:.4f}".format
    columns: Columns = [
        ("text", str), ("model", str), ("mean KL", _mean), ("median", precise), ("99%", precise),
        ("same top", format_share), ("accepted", format_share),
    ]  # fmt: skip
    fields = ("median", "p99", "same_top", "accepted")
    rows = [
        [name, model, scores.divergence, *(getattr(scores.divergence, field) for field in fields)]
        for name, model, scores in scored
        if isinstance(scores, PrunedTextScores)
    ]
    notes = [
        "KL: how far from dense, in nats per token. same top: positions with the same first "
        "choice. accepted: "
        "sampled tokens that the dense model keeps if this one drafts for it."
    ]
    return tabulate("Divergence from the dense model", columns, rows, notes)


def _mean(kl: DivergenceRecord) -> str:
    return f"{kl.mean:.4f}" + ("" if kl.standard_error is None else f" ± {kl.standard_error:.4f}")


def text_settings(texts: Sequence[TextResult], names: Sequence[str]) -> Table:
    """List the windows and tokens behind each perplexity."""
    columns: Columns = [
        ("text", str), ("windows", str), ("predicted tokens", "{:,}".format), ("BOS", str), ("errors are by", str)
    ]  # fmt: skip
    rows = [
        [
            name, f"{text.windows} windows of {text.sequence_length} tokens", text.tokens, _BOS[text.bos],
            f"{text.clusters:,} {text.clustered_by}",
        ]
        for name, text in zip(names, texts, strict=True)
    ]  # fmt: skip
    return tabulate("How perplexity was measured", columns, rows)


def tasks(scored: Iterable[Scored]) -> Table:
    """List each metric of each task on each model, in lm-eval's numbers."""
    score, change, count = "{:.4f}".format, "{:+.4f}".format, "{:,}".format
    columns: Columns = [
        ("task", str), ("model", str), ("score", score), ("change", change), ("95%", partial(between, form=change)),
        ("lost", count), ("gained", count), ("p", format_probability),
    ]  # fmt: skip
    compared = ("difference", "difference_interval", "lost", "gained", "mcnemar_p")
    rows = [
        [name, model, scores.value, *(getattr(scores, field, None) for field in compared)]
        for name, model, scores in scored
    ]
    notes = [
        "lost: items that went from right to wrong; gained: from wrong to right; p: exact McNemar "
        "test."
    ]
    return tabulate("Tasks", columns, rows, notes)


def is_canary(task: TaskResult) -> bool:
    """Whether a task is one of ours, which break first and say nothing about a model's knowledge."""
    return task.task.startswith("sleb_")


def _use(task: TaskResult) -> str:
    if is_canary(task):
        return "instructions" if task.task == "sleb_instructions" else "canaries"
    names = {
        "choosing": "choosing an answer",
        "programs": "writing programs",
        "writing": "writing answers",
    }
    return names[task.use] if task.use else ""


def main_tasks(tasks: Iterable[TaskResult]) -> list[TaskResult]:
    """Return the main metric of each task that counts items, if higher is better."""
    of_task: dict[str, list[TaskResult]] = {}
    for task in tasks:
        if task.doc_ids:
            of_task.setdefault(task.task, []).append(task)
    return [task for task in map(main_metric, of_task.values()) if task.higher_is_better]


def by_use(tasks: Iterable[TaskResult]) -> dict[str, list[TaskResult]]:
    """Group the main tasks by kind of use."""
    uses: dict[str, list[TaskResult]] = {}
    for task in main_tasks(tasks):
        if use := _use(task):
            uses.setdefault(use, []).append(task)
    return uses


def retention(tasks: Sequence[TaskResult], removals: SizeKey) -> Estimate | None:
    """Return the mean score as a share of the dense model's; None if a task was not measured at
    this size.
    """
    entries = [
        entry for task in tasks for entry in task.pruned if set(entry.removals) == set(removals)
    ]
    dense = sum(task.dense.value for task in tasks)
    if not tasks or len(entries) < len(tasks) or dense <= 0:
        return None
    value = 1 + sum(entry.difference for entry in entries) / dense
    ends = [entry.difference_interval for entry in entries if entry.difference_interval]
    if len(ends) < len(entries):
        return value, None
    # Tasks are independent, so the half-widths of their intervals add in quadrature.
    half_width = math.hypot(*((interval.high - interval.low) / 2 for interval in ends)) / dense
    # Not validated: intervals in a file can be so wide that this one is infinite.
    return value, Interval.model_construct(low=value - half_width, high=value + half_width)


def verdicts(tasks: Iterable[TaskResult]) -> Table:
    """Judge each size by its retention for each kind of use."""
    percent = "{:.0%}".format
    columns: Columns = [
        ("use", str), ("model", str), ("kept", percent), ("95%", partial(between, form=percent)), ("verdict", str),
    ]  # fmt: skip
    rows = [
        [use, model_name(removals), *share, _verdict(*share)]
        for use, of_use in by_use(tasks).items()
        for removals in dict.fromkeys(entry.removals for task in of_use for entry in task.pruned)
        if (share := retention(of_use, removals))
    ]
    notes = [
        "kept: the mean score as a share of the dense model's. When choosing, guessing alone keeps "
        "much of it."
    ]
    return tabulate("Verdict by kind of use", columns, rows, notes)


def keeps_enough(interval: Interval | None) -> bool | None:
    """Whether ENOUGH is kept; None if the interval does not tell."""
    if interval is None or interval.low < ENOUGH <= interval.high:
        return None
    return interval.low >= ENOUGH


def _verdict(share: float, interval: Interval | None) -> str:
    if interval is None:
        return ""
    if keeps_enough(interval):
        return "kept"
    if interval.high < 1:
        return f"{1 - share:.0%} lost"
    lost = 1 - interval.low
    return (
        f"no loss shown, at most {lost:.0%}"
        if lost < _MAX_POSSIBLE_LOSS
        else "too few items to tell"
    )
