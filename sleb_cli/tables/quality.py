"""What a removal costs, on texts and on tasks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sleb_cli.names import public_source
from sleb_cli.order import SizeKey
from sleb_cli.results import (
    CorpusResult,
    DivergenceRecord,
    EvalResult,
    Interval,
    PrunedTextScores,
    TaskResult,
    TextResult,
    main_metric,
)
from sleb_cli.tables.table import (
    DENSE,
    PERPLEXITY,
    Column,
    Scored,
    Table,
    between,
    by_model,
    model_name,
    tabulate,
)
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

KEPT = "kept"
LOST = "lost"
"""Verdicts that allow no doubt; the share that is lost stands before it."""

_MAX_POSSIBLE_LOSS = 0.25
"""If the interval allows a greater loss, there were too few items to tell."""

_BOS = {"none": "no BOS", "text": "BOS before the text", "windows": "BOS in each"}

_USES = {
    "choosing": "choosing an answer",
    "programs": "writing programs",
    "writing": "writing answers",
}
_CANARY_USES = {"sleb_instructions": "instructions", "sleb_loops": "ending long answers"}


_MEASURES = {
    "neighbours": "neighbours: the share of the dense model's ten nearest texts that stay. It is "
    "smaller, the more texts there are.",
    "in 20": "in 20: the share of these ten that are among the pruned model's twenty nearest.",
    "old index": "old index: texts keep the dense model's vectors, and only what is asked is read "
    "by the pruned model; own index: it reads all.",
    "rank correlation": "rank correlation: Spearman's, of all similarities or scores of a query; 0 "
    "if they are all equal.",
    "same class": "same class: the share of texts that stay in the dense model's class.",
}
"""What the words in the names of measures mean."""


def evaluation_tables(result: EvalResult, names: Sequence[str]) -> list[Table]:
    """List the scores of each model on each text, of these names, and on each task."""
    other = ""
    legend = PERPLEXITY
    if result.compared:
        other = "other"
    else:
        legend += f" {DENSE}"
    texts = by_model(result.texts, names, other)
    return [
        perplexities(texts, legend),
        tasks(by_model(result.tasks, task_names(result.tasks), other)),
        verdicts(by_use(result.tasks), other),
        corpora(result.corpora, other),
        corpus_verdicts(result.corpora, other),
        divergences(texts),
        text_settings(result.texts, names),
    ]


def perplexity_change(scores: PrunedTextScores) -> Estimate:
    """Return the relative change of a text's perplexity."""
    change = math.expm1(scores.log_ratio)
    ends = scores.interval
    if ends is None:
        return change, None
    return change, Interval(low=math.expm1(ends.low), high=math.expm1(ends.high))


def text_names(
    texts: Sequence[TextResult], remarks_on: Callable[[TextResult], list[str]] | None = None
) -> list[str]:
    """Name each text, with remarks that tell texts of one name apart."""
    names = []
    for text in texts:
        name = public_source(text.text)
        namesakes = [other for other in texts if public_source(other.text) == name]
        remarks = []
        if text.clustered_by == "conversations":
            remarks.append("answers")
        for number, detail in enumerate(_text_details(text)):
            if any(_text_details(other)[number] != detail for other in namesakes):
                remarks.append(detail)
        if remarks_on:
            remarks += remarks_on(text)
        names.append(f"{name} ({', '.join(remarks)})" if remarks else name)
    return names


def _text_details(text: TextResult) -> list[str]:
    return [
        f"windows of {text.sequence_length:,}",
        _BOS[text.bos],
        f"{text.windows:,} of them",
        f"tokens {text.tokens_sha256[:8]}",
    ]


def task_name(task: TaskResult) -> str:
    """Name a task with its metric: piqa, acc, 5-shot, chat."""
    words = [task.task, task.metric]
    if task.filter not in ("none", ""):
        words.append(task.filter)
    if task.num_fewshot:
        words.append(f"{task.num_fewshot}-shot")
    if task.chat:
        words.append("chat")
    if not task.higher_is_better:
        words.append("lower is better")
    return ", ".join(words)


def task_names(tasks: Sequence[TaskResult]) -> list[str]:
    """Name each task, with its number of items, or their hash if it was run on several sets."""
    items = []
    hashes = []
    for task in tasks:
        short_hash = str(task.items_sha256)[:8]
        hashes.append(f" {short_hash}")
        # A group has no items of its own, but a hash of its tasks' items.
        count = plural(len(task.doc_ids), "item") if task.doc_ids else f"items {short_hash}"
        items.append(f", {count}")
    names = [task_name(task) for task in tasks]
    return _tell_apart(_tell_apart(names, items), hashes)


def corpus_names(results: Sequence[CorpusResult]) -> list[str]:
    """Name each measure with its corpus, and the hash of its texts if it was read in other ways."""
    names = [f"{result.measure}, {result.corpus}" for result in results]
    hashes = [f" {result.sha256[:8]}" for result in results]
    return _tell_apart(names, hashes)


def _tell_apart(names: Sequence[str], remarks: Sequence[str]) -> list[str]:
    """Add its remark to each name that is not the only one of its kind."""
    told = []
    for name, remark in zip(names, remarks, strict=True):
        told.append(name + remark if names.count(name) > 1 else name)
    return told


def perplexities(scored: Iterable[Scored], legend: str) -> Table:
    """List the perplexity of each text on each model."""
    columns: list[Column] = [
        ("text", str),
        ("model", str),
        ("perplexity", format_perplexity),
        ("change", format_change),
        ("95%", partial(between, form=format_change)),
    ]
    notes = [legend]
    rows = []
    for name, model, scores in scored:
        change = interval = None
        if isinstance(scores, PrunedTextScores):
            change, interval = perplexity_change(scores)
        rows.append([name, model, scores.perplexity, change, interval])
    if any(change is not None for *_, change, _ in rows):
        notes.append("95%: interval of the change; both models read the same tokens.")
    return tabulate("Perplexity", columns, rows, notes)


def divergences(scored: Iterable[Scored]) -> Table:
    """List the divergence of the predictions from the dense model's."""
    columns: list[Column] = [
        ("text", str),
        ("model", str),
        ("mean KL", _format_mean),
        ("median", "{:.4f}".format),
        ("99%", "{:.4f}".format),
        ("same top", format_share),
        ("accepted", format_share),
    ]
    rows = []
    for name, model, scores in scored:
        if isinstance(scores, PrunedTextScores):
            kl = scores.divergence
            rows.append([name, model, kl, kl.median, kl.p99, kl.same_top, kl.accepted])
    notes = [
        "KL: how far the predictions are from the dense model's, in nats per token; 0 is equal. "
        "99%: what 1% of the tokens exceed. same top: positions at which both models find the same "
        "token most likely. accepted: tokens drawn from this model that the dense one would keep, "
        "if this one drafted for it."
    ]
    return tabulate("Divergence from the dense model", columns, rows, notes)


def _format_mean(kl: DivergenceRecord) -> str:
    if kl.standard_error is None:
        return f"{kl.mean:.4f}"
    return f"{kl.mean:.4f} ± {kl.standard_error:.4f}"


def text_settings(texts: Sequence[TextResult], names: Sequence[str]) -> Table:
    """List the windows and tokens behind each perplexity."""
    columns: list[Column] = [
        ("text", str),
        ("windows", str),
        ("predicted tokens", "{:,}".format),
        ("BOS", str),
        ("errors are by", str),
    ]
    rows = []
    for name, text in zip(names, texts, strict=True):
        windows = f"{text.windows} windows of {text.sequence_length} tokens"
        clusters = f"{text.clusters:,} {text.clustered_by}"
        rows.append([name, windows, text.tokens, _BOS[text.bos], clusters])
    return tabulate("How perplexity was measured", columns, rows)


def tasks(scored: Iterable[Scored]) -> Table:
    """List each metric of each task on each model, in lm-eval's numbers."""
    change = "{:+.4f}".format
    columns: list[Column] = [
        ("task", str),
        ("model", str),
        ("score", "{:.4f}".format),
        ("change", change),
        ("95%", partial(between, form=change)),
        ("lost", "{:,}".format),
        ("gained", "{:,}".format),
        ("p", format_probability),
    ]
    fields = ("value", "difference", "difference_interval", "lost", "gained", "mcnemar_p")
    rows = []
    for name, model, scores in scored:
        # The dense model's scores have only a value.
        rows.append([name, model, *(getattr(scores, field, None) for field in fields)])
    notes = [
        "lost: items that went from right to wrong; gained: from wrong to right; p: exact McNemar "
        "test."
    ]
    return tabulate("Tasks", columns, rows, notes)


def corpora(results: Sequence[CorpusResult], other: str = "") -> Table:
    """List each measure of each corpus on each model."""
    names = _measure_names(results)
    notes = [_describe(result) for result in results]
    for word, note in _MEASURES.items():
        if any(word in name for name in names):
            notes.append(note)
    table = tasks(by_model(results, names, other))
    columns = ["measure", *table.columns[1:]]
    return replace(table, title="Corpora", columns=columns, notes=list(dict.fromkeys(notes)))


def by_measure(results: Sequence[CorpusResult]) -> dict[str, list[CorpusResult]]:
    """Return what was measured of corpora, each by its name."""
    names = _measure_names(results)
    return {name: [result] for name, result in zip(names, results, strict=True)}


def _measure_names(results: Sequence[CorpusResult]) -> list[str]:
    names = []
    for result in results:
        alone = result.sha256 == results[0].sha256 == results[-1].sha256
        names.append(result.measure if alone else f"{result.measure}, {result.corpus}")
    return names


def _describe(corpus: CorpusResult) -> str:
    """Say what was read of a corpus."""
    read = f"{corpus.corpus}: {plural(corpus.texts, 'text')}"
    if corpus.queries:
        read += f", {corpus.queries:,} queries"
    read += f", of at most {corpus.sequence_length:,} tokens"
    prompts = [repr(prompt) for prompt in corpus.prompts if prompt]
    if prompts:
        read += f", which begin with {' and '.join(prompts)}"
    return f"{read}."


def is_canary(task: TaskResult) -> bool:
    """Whether a task is one of ours, which break first and say nothing about knowledge."""
    return task.task.startswith("sleb_")


def _use(task: TaskResult) -> str:
    if is_canary(task):
        return _CANARY_USES.get(task.task, "canaries")
    return _USES[task.use] if task.use else ""


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
        use = _use(task)
        if use:
            uses.setdefault(use, []).append(task)
    return uses


def retention(tasks: Sequence[TaskResult | CorpusResult], removals: SizeKey) -> Estimate | None:
    """Return the mean score as a share of the dense model's; None if a task lacks this size."""
    dense = 0.0
    differences = []
    half_widths = []
    for task in tasks:
        dense += task.dense.value
        for scores in task.pruned:
            if set(scores.removals) == set(removals):
                differences.append(scores.difference)
                ends = scores.difference_interval
                if ends:
                    half_widths.append((ends.high - ends.low) / 2)
    if len(differences) < len(tasks) or dense <= 0:
        return None
    kept_share = 1 + sum(differences) / dense
    if len(half_widths) < len(differences):
        return kept_share, None
    # Tasks are independent, so the half-widths of their intervals add in quadrature.
    half_width = math.hypot(*half_widths) / dense
    # Not validated: intervals in a file can be so wide that this one is infinite.
    return kept_share, Interval.model_construct(
        low=kept_share - half_width, high=kept_share + half_width
    )


def verdicts(uses: Mapping[str, Sequence[TaskResult | CorpusResult]], other: str = "") -> Table:
    """Judge each size by its retention for each kind of use."""
    columns: list[Column] = [
        ("use", str),
        ("model", str),
        ("kept", "{:.0%}".format),
        ("95%", partial(between, form="{:.0%}".format)),
        ("verdict", str),
    ]
    rows = []
    for use, of_use in uses.items():
        for removals in dict.fromkeys(size.removals for task in of_use for size in task.pruned):
            share = retention(of_use, removals)
            if share:
                rows.append([use, other or model_name(removals), *share, verdict(*share)])
    notes = [
        "kept: the mean score as a share of the dense model's. When choosing, guessing alone keeps "
        "much of it."
    ]
    return tabulate("Verdict by kind of use", columns, rows, notes)


def corpus_verdicts(results: Sequence[CorpusResult], other: str = "") -> Table:
    """Judge each size by its retention of each measure of a corpus."""
    table = verdicts(by_measure(results), other)
    columns = ["measure", *table.columns[1:]]
    notes = ["kept: the score as a share of the dense model's."]
    return replace(table, title="Verdict by measure", columns=columns, notes=notes)


def verdict(share: float, interval: Interval | None) -> str:
    """Say what the share of the dense model's score means; nothing without an interval."""
    if interval is None:
        return ""
    if interval.low >= ENOUGH:
        return KEPT
    if interval.high < 1:
        return f"{1 - share:.0%} {LOST}"
    possible_loss = 1 - interval.low
    if possible_loss < _MAX_POSSIBLE_LOSS:
        return f"no loss shown, at most {possible_loss:.0%}"
    return "too few items to tell"
