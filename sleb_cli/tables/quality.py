"""What a removal costs, on texts and on tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from sleb_cli.plan import public_name
from sleb_cli.results import DivergenceRecord, Interval, PrunedTextScores, TaskResult, TextResult
from sleb_cli.tables.table import Columns, Scored, Table, between, tabulate
from sleb_cli.units import format_change, format_perplexity, format_probability, format_share, plural

_BOS = {"none": "no BOS", "text": "BOS before the text", "windows": "BOS in each"}


def perplexity_change(scores: PrunedTextScores) -> tuple[float, Interval | None]:
    """Return the relative change of a text's perplexity, with its interval."""
    ends = scores.interval
    interval = Interval(low=math.expm1(ends.low), high=math.expm1(ends.high)) if ends else None
    return math.expm1(scores.log_ratio), interval


def windows_of(text: TextResult) -> str:
    """Return how a text was cut: 24 windows of 2048 tokens."""
    return f"{text.windows} windows of {text.sequence_length} tokens"


def text_names(
    texts: Sequence[TextResult], remarks_on: Callable[[TextResult], list[str]] = lambda text: []
) -> list[str]:
    """Return the name of each text, with what tells it from others of the same name, and further remarks."""
    tells = [
        (
            f"windows of {text.sequence_length:,}", _BOS[text.bos], f"{text.windows:,} of them",
            f"tokens {text.tokens_sha256[:8]}",
        )
        for text in texts
    ]  # fmt: skip
    names, public = list[str](), [public_name(text.text) for text in texts]
    for text, name, own in zip(texts, public, tells, strict=True):
        alike = [tell for other, tell in zip(public, tells, strict=True) if other == name]
        differing = [len(set(column)) > 1 for column in zip(*alike, strict=True)]
        remarks = ["answers"] * (text.clustered_by == "conversations")
        remarks += [tell for tell, differs in zip(own, differing, strict=True) if tell and differs] + remarks_on(text)
        names.append(name + (f" ({', '.join(remarks)})" if remarks else ""))
    return names


def task_name(task: TaskResult) -> str:
    """Return a task with its metric: piqa, acc, 5-shot, chat."""
    details = [
        task.metric,
        task.filter if task.filter != "none" else "",
        f"{task.num_fewshot}-shot" if task.num_fewshot else "",
        "chat" if task.chat else "",
        "" if task.higher_is_better else "lower is better",
    ]
    return ", ".join([task.task, *filter(None, details)])


def task_names(tasks: Sequence[TaskResult]) -> list[str]:
    """Return the name of each task, with what tells its items from others if it was run on several sets of them."""
    names = list(map(task_name, tasks))
    return [
        f"{name}, {items_of(task)}" if names.count(name) > 1 else name for name, task in zip(names, tasks, strict=True)
    ]


def items_of(task: TaskResult) -> str:
    """Return what tells the items of a task from those of another run: their number or, of a group, a hash."""
    return plural(len(task.doc_ids), "item") if task.doc_ids else f"items {task.items_sha256}"[:14]


def perplexities(scored: Iterable[Scored]) -> Table:
    """Return the perplexity of each text on each model."""
    columns: Columns = [
        ("text", str), ("model", str), ("perplexity", format_perplexity), ("change", format_change),
        ("95%", partial(between, form=format_change)),
    ]  # fmt: skip
    rows = []
    for name, model, scores in scored:
        change = perplexity_change(scores) if isinstance(scores, PrunedTextScores) else (None, None)
        rows.append([name, model, scores.perplexity, *change])
    compared = any(row[3] is not None for row in rows)
    notes = ["95%: interval of the change; both models read the same tokens."] * compared
    return tabulate("Perplexity", columns, rows, notes)


def divergences(scored: Iterable[Scored]) -> Table:
    """Return how far predictions are from the dense model's."""
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
        "KL: from the dense model, in nats per token. same top: positions with the same first choice. accepted: "
        "sampled tokens that the dense model keeps if this one drafts for it."
    ]
    return tabulate("Divergence from the dense model", columns, rows, notes)


def _mean(kl: DivergenceRecord) -> str:
    return f"{kl.mean:.4f}" + ("" if kl.standard_error is None else f" ± {kl.standard_error:.4f}")


def text_settings(texts: Sequence[TextResult], names: Sequence[str]) -> Table:
    """Return how each perplexity was measured."""
    columns: Columns = [
        ("text", str), ("windows", str), ("predicted tokens", "{:,}".format), ("BOS", str), ("errors are by", str)
    ]  # fmt: skip
    rows = [
        [name, windows_of(text), text.tokens, _BOS[text.bos], f"{text.clusters:,} {text.clustered_by}"]
        for name, text in zip(names, texts, strict=True)
    ]
    return tabulate("How perplexity was measured", columns, rows)


def tasks(scored: Iterable[Scored]) -> Table:
    """Return each metric of each task on each model, in lm-eval's numbers."""
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
    notes = ["lost: items that went from right to wrong; gained: from wrong to right; p: exact McNemar test."]
    return tabulate("Tasks", columns, rows, notes)
