"""What a removal costs, on texts and on tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from sleb_cli.plan import public_name
from sleb_cli.results import (
    Interval,
    PrunedTaskScores,
    PrunedTextScores,
    TaskResult,
    TaskScores,
    TextResult,
    TextScores,
)
from sleb_cli.tables.table import Table, between, number
from sleb_cli.units import format_change, format_perplexity, format_probability, format_share

_BOS = {"none": "no BOS", "text": "BOS before the text", "windows": "BOS in each"}


def model_name(removals: Sequence[int]) -> str:
    """Return what a row calls a model: dense, or -6 without 6 blocks."""
    return f"-{len(removals)}" if removals else "dense"


def perplexity_change(scores: PrunedTextScores) -> tuple[float, Interval | None]:
    """Return the relative change of a text's perplexity, with its interval."""
    ends = scores.interval
    interval = Interval(low=math.expm1(ends.low), high=math.expm1(ends.high)) if ends else None
    return math.expm1(scores.log_ratio), interval


def windows_of(text: TextResult) -> str:
    """Return how a text was cut: 24 windows of 2048 tokens, stride 512."""
    stride = f", stride {text.stride}" if text.stride else ""
    return f"{text.windows} windows of {text.sequence_length} tokens{stride}"


def text_names(
    texts: Sequence[TextResult], remarks_on: Callable[[TextResult], list[str]] = lambda text: []
) -> list[str]:
    """Return the name of each text, with what tells it from others of the same name, and further remarks."""
    tells = [
        (
            f"windows of {text.sequence_length:,}", f"stride {text.stride:,}" if text.stride else "", _BOS[text.bos],
            f"{text.windows:,} of them", f"tokens {text.tokens_sha256[:8]}",
        )
        for text in texts
    ]  # fmt: skip
    names = []
    for text, own in zip(texts, tells, strict=True):
        alike = [tell for other, tell in zip(texts, tells, strict=True) if other.text == text.text]
        differing = [len(set(column)) > 1 for column in zip(*alike, strict=True)]
        remarks = [tell for tell, differs in zip(own, differing, strict=True) if tell and differs] + remarks_on(text)
        names.append(public_name(text.text) + (f" ({', '.join(remarks)})" if remarks else ""))
    return names


def task_name(task: TaskResult) -> str:
    """Return a task with its metric: piqa, acc, 5-shot."""
    details = [
        task.metric,
        task.filter if task.filter != "none" else "",
        f"{task.num_fewshot}-shot" if task.num_fewshot else "",
        "" if task.higher_is_better else "lower is better",
    ]
    return ", ".join([task.task, *filter(None, details)])


def texts_by_model(texts: Sequence[TextResult], names: Sequence[str]) -> Iterator[tuple[str, str, TextScores]]:
    """Yield the scores of each text on the dense and each pruned model, with the names of both."""
    for name, text in zip(names, texts, strict=True):
        yield name, "dense", text.dense
        yield from ((name, model_name(scores.removals), scores) for scores in text.pruned)


def tasks_by_model(tasks: Iterable[TaskResult]) -> Iterator[tuple[TaskResult, str, str, TaskScores]]:
    """Yield the scores of each task on the dense and each pruned model, with the names of both."""
    for task in tasks:
        yield task, task_name(task), "dense", task.dense
        yield from ((task, task_name(task), model_name(scores.removals), scores) for scores in task.pruned)


def perplexities(scored: Iterable[tuple[str, str, TextScores]], title: str = "Perplexity") -> Table:
    """Return the perplexity of each text on each model."""
    columns = ["text", "model", "perplexity", "change", "95%", "per word", "bits/byte", "ECE"]
    rows = []
    for name, model, scores in scored:
        change, interval = perplexity_change(scores) if isinstance(scores, PrunedTextScores) else (None, None)
        word = scores.word_perplexity
        rows.append(
            [
                name,
                model,
                format_perplexity(scores.perplexity),
                "" if change is None else format_change(change),
                between(interval, format_change),
                "" if word is None else format_perplexity(word),
                number(scores.bits_per_byte, ".3f"),
                f"{scores.calibration_error:.3f}",
            ]
        )
    notes = ["ECE: expected calibration error."]
    if any(row[3] for row in rows):
        notes = [f"95%: interval of the change; both models read the same tokens. {notes[0]}"]
    return Table(title, columns, rows, notes, words={"model"}, optional=["per word", "ECE", "bits/byte"]).filled()


def divergences(scored: Iterable[tuple[str, str, TextScores]]) -> Table:
    """Return how far predictions are from the dense model's, with the figures of llama-perplexity."""
    columns = ["text", "model", "mean KL", "median", "90%", "99%", "max", "RMS Δp", "same top"]
    rows = []
    for name, model, scores in scored:
        if isinstance(scores, PrunedTextScores):
            kl = scores.divergence
            error = "" if kl.standard_error is None else f" ± {kl.standard_error:.4f}"
            shares = [f"{share:.4f}" for share in (kl.median, kl.p90, kl.p99, kl.maximum)]
            changes = [format_share(kl.probability_change_rms), format_share(kl.same_top)]
            rows.append([name, model, f"{kl.mean:.4f}{error}", *shares, *changes])
    notes = ["KL: from the dense model, in nats per token. same top: positions with the same first choice."]
    return Table(
        "Divergence from the dense model", columns, rows, notes, words={"model"}, optional=["median", "90%", "max"]
    )


def text_settings(texts: Sequence[TextResult], names: Sequence[str]) -> Table:
    """Return how each perplexity was measured."""
    columns = ["text", "windows", "predicted tokens", "BOS", "errors are by"]
    rows = [
        [name, windows_of(text), f"{text.tokens:,}", _BOS[text.bos], f"{text.clusters:,} {text.clustered_by}"]
        for name, text in zip(names, texts, strict=True)
    ]
    words, optional = {"windows", "BOS", "errors are by"}, ["errors are by", "predicted tokens"]
    return Table("How perplexity was measured", columns, rows, words=words, optional=optional)


def tasks(scored: Iterable[tuple[TaskResult, str, str, TaskScores]]) -> Table:
    """Return each metric of each task on each model, in lm-eval's numbers."""
    columns = [
        "task", "model", "score", "score 95%", "difference", "95%", "kept", "lost", "gained", "p", "items", "for 1 pt"
    ]  # fmt: skip
    rows = []
    for task, name, model, scores in scored:
        row = [name, model, f"{scores.value:.4f}", between(scores.interval, "{:.4f}".format)]
        pruned = scores if isinstance(scores, PrunedTaskScores) else None
        row += ["", "", "", "", "", ""] if pruned is None else _differences(pruned)
        needed = number(pruned.items_needed, ",") if pruned else ""
        rows.append([*row, f"{len(task.doc_ids):,}" if task.doc_ids else "", needed])
    notes = [
        "lost: items that went from right to wrong; gained: from wrong to right; p: exact McNemar test; "
        "for 1 pt: items that would show a difference of one point."
    ]
    optional = ["for 1 pt", "items", "kept", "p", "score 95%"]
    return Table("Tasks", columns, rows, notes, words={"model"}, optional=optional).filled()


def _differences(scores: PrunedTaskScores) -> list[str]:
    return [
        f"{scores.difference:+.4f}",
        between(scores.difference_interval, "{:+.4f}".format),
        "" if scores.retention is None else format_share(scores.retention),
        number(scores.lost, ","),
        number(scores.gained, ","),
        "" if scores.mcnemar_p is None else format_probability(scores.mcnemar_p),
    ]
