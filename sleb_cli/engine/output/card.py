"""The README of a pruned checkpoint, its model card on the Hub."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCardData, metadata_load

from sleb_cli.engine.files.copying import holds_file
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.measured import of_size
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.names import public_source
from sleb_cli.order import Order, SizeKey
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, RecoveryRecord, SampleGeneration
from sleb_cli.records import OutputKind, Proof
from sleb_cli.results import ApplyResult, BenchResult, EvalResult
from sleb_cli.tables import search_results
from sleb_cli.tables.checks import check_clauses
from sleb_cli.tables.quality import perplexity_change, task_name, text_names
from sleb_cli.tables.speed import tokens_per_second, workload_name
from sleb_cli.tables.table import Table, in_markdown, to_markdown
from sleb_cli.tables.usage import python_lines
from sleb_cli.units import format_change, format_perplexity
from sleb_cli.version import __version__

CARD = "README.md"

_NOT_IN_HUB_NAME = re.compile(r"[^\w.-]+")


_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)

_PIPELINES = {
    None: "text-generation",
    "vectors": "feature-extraction",
    "scores": "text-ranking",
    "classes": "text-classification",
}


@dataclass(frozen=True)
class _Row:
    """A row of the table of results, and the result in the Hub's form, if it has one."""

    cells: list[str]
    hub: HubResult | None = None


def model_card(
    subject: Subject,
    written: ApplyResult,
    evaluation: EvalResult | None,
    benchmark: BenchResult | None,
) -> str:
    """Write the README: base model, removed parts, search, results and proof.

    It names no local folders.
    """
    source, recovery = subject.architecture.source, written.recovery
    rows = []
    if recovery is None:
        rows = _searched(subject.own_plan)
    evaluated = _evaluated(evaluation, subject.surgery.size_key)
    timed = _timed(benchmark, subject.surgery.size_key)
    name = in_markdown(source.name)
    if source.revision:
        name = f"`{source.id}` at revision `{source.revision}`"
    lines = [
        _front_matter(subject, [row.hub for row in evaluated if row.hub]),
        f"# {in_markdown(source.name)} without {subject.surgery.cuts[0].description}",
        "",
        f"- Base model: {name}",
        *_removal(subject, recovery),
    ]
    for cut in written.cuts:
        lines.append(f"- {cut.title}: {cut.change}")
    cells = [row.cells for row in (*rows, *evaluated, *timed)]
    columns = ["measured", "base model", "this model", "change"]
    lines += _table(Table("Results", columns, cells, _conditions(evaluation, benchmark)))
    if subject.own_plan and subject.own_plan.sample_generation:
        lines += _sample_generation(subject.own_plan.sample_generation)
    if recovery:
        lines += _recovery(subject.order, recovery, written.model.output)
    lines += _proof(written.proof)
    if written.model.output:
        lines += _for_readers(source, written.model.output, subject.surgery.name)
    return "\n".join([*lines, ""])


def _for_readers(source: ModelSource, output: OutputKind, name: str) -> list[str]:
    """Say how the model is run, and repeat the base model's card."""
    imported, run = python_lines(output, name)
    lines = ["", "```python", imported, "", run, "```"]
    if holds_file(source.folder, CARD):
        theirs = _FRONT_MATTER.sub(
            "", (source.folder / CARD).read_text("utf-8", "replace"), count=1
        )
        lines += ["", "---", "", "What follows is the base model's card, unchanged."]
        lines += ["", theirs.strip()]
    return lines


def _removal(subject: Subject, recovery: RecoveryRecord | None) -> list[str]:
    made = f"- Made by sleb {__version__}"
    removals, plan = subject.surgery.removals, subject.plan
    how = "no training"
    if recovery:
        how = f"the {subject.order.recovered} given new weights"
    if removals:
        numbers = ", ".join(map(str, removals))
        return [
            f"- Blocks removed, in order, numbered from 0 in the base model: {numbers}",
            f"{made} (SLEB, arXiv:2402.09025): whole transformer blocks removed, {how}",
            _search(subject),
        ]
    if plan is None or plan.order.whole_blocks:
        return [made]
    return [
        f"{made}: {plan.unit} removed, {how} (`{CHECKPOINT_PLAN}` has those that went, and "
        f"every score)",
        f"- {plan.unit.capitalize()} chosen by {in_markdown(plan.search.metric)} on "
        f"{in_markdown(str(plan.calibration.published()))}",
        f"- {plan.order.caveat}",
    ]


def _search(subject: Subject) -> str:
    if subject.plan is None:
        return "- The blocks were chosen by hand."
    search = subject.plan.search
    where = "" if subject.own_plan else " of another model"
    metric = in_markdown(search.metric)
    return (
        f"- Found by {search.strategy} search{where}: metric {metric} (`{CHECKPOINT_PLAN}` has "
        f"every score)"
    )


def _front_matter(subject: Subject, results: list[HubResult]) -> str:
    source = subject.architecture.source
    base: dict[str, Any] = {}
    if holds_file(source.folder, CARD):
        with suppress(OSError, ValueError, yaml.YAMLError):
            base = metadata_load(source.folder / CARD) or {}
    output = subject.architecture.record.output
    library = "transformers"
    if output:
        library = _word(base.get("library_name")) or library
    tags = ["sleb", "pruned"]
    for tag in _listed(base.get("tags")):
        # Some programs write `base_model:` tags, which name the base of the base, not ours.
        if not tag.startswith("base_model:"):
            tags.append(tag)
    data = ModelCardData(
        base_model=source.id if source.revision else None,
        # The Hub knows adapter, merge, quantized and finetune: only the last is of the base model's
        # own kind, changed.
        base_model_relation="finetune" if source.revision else None,
        library_name=library,
        pipeline_tag=_word(base.get("pipeline_tag")) or _PIPELINES[output],
        license=_words(base.get("license")) or None,
        # A licence that the Hub does not know is "other", and these say which.
        license_name=_word(base.get("license_name")),
        license_link=_word(base.get("license_link")),
        language=_words(base.get("language")) or None,
        tags=tags,
        eval_results=results or None,
        model_name=subject.surgery.name if results else None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _listed(value: Any) -> list[str]:
    words = []
    for item in value if isinstance(value, list) else [value]:
        # Norwegian is `no`, which YAML takes for false.
        word = "no" if item is False else _word(item)
        if word:
            words.append(word)
    return words


def _words(value: Any) -> Any:
    """Return a list for a list, and else a word or None."""
    words = _listed(value)
    return words if isinstance(value, list) else next(iter(words), None)


def _searched(plan: Plan | None) -> list[_Row]:
    """Return a row for each text of the search."""
    if plan is None:
        return []
    if plan.parts is None:
        title = f"{plan.calibration.title} (searched on)"
        if plan.perplexity is None or plan.dense.perplexity is None:
            distance = plan.steps[-1].distance if plan.steps else 0.0
            return [_Row([f"distance, {title}", "0", f"{distance:.4f}", ""])]
        return [_perplexity_row(title, plan.dense.perplexity, plan.perplexity)]
    rows = []
    for text in plan.parts.texts:
        title = f"{public_source(text.text)} ({'held out' if text.held_out else 'searched on'})"
        rows.append(_perplexity_row(title, math.exp(text.dense), math.exp(text.pruned)))
    return rows


def _perplexity_row(title: str, dense: float, pruned: float) -> _Row:
    perplexities = [format_perplexity(dense), format_perplexity(pruned)]
    return _Row([f"perplexity, {title}", *perplexities, format_change(pruned / dense - 1)])


def _evaluated(evaluation: EvalResult | None, size: SizeKey) -> list[_Row]:
    """Return a row for each text, task and measure of a corpus."""
    if evaluation is None:
        return []
    rows = []
    for name, text in zip(text_names(evaluation.texts), evaluation.texts, strict=True):
        if pruned := of_size(text.pruned, size):
            change = format_change(perplexity_change(pruned)[0])
            dense = format_perplexity(text.dense.perplexity)
            cells = [f"perplexity, {name}", dense, format_perplexity(pruned.perplexity), change]
            dataset = public_source(text.text)
            rows.append(_Row(cells, _hub_result(dataset, "perplexity", pruned.perplexity)))
    for task in evaluation.tasks:
        if scores := of_size(task.pruned, size):
            cells = [
                task_name(task),
                f"{task.dense.value:.4f}",
                f"{scores.value:.4f}",
                f"{scores.difference:+.4f}",
            ]
            rows.append(_Row(cells, _hub_result(task.task, task.metric, scores.value)))
    for result in evaluation.corpora:
        if measured := of_size(result.pruned, size):
            name = f"{result.measure}, {public_source(result.corpus)}"
            values = [f"{result.dense.value:.4f}", f"{measured.value:.4f}"]
            rows.append(_Row([name, *values, f"{measured.difference:+.4f}"]))
    return rows


def _timed(benchmark: BenchResult | None, size: SizeKey) -> list[_Row]:
    """Return a row for each workload that was timed."""
    if benchmark is None:
        return []
    rows = []
    for result in benchmark.workloads:
        if timing := of_size(result.pruned, size):
            unit = "tokens a second"
            rates = [
                tokens_per_second(result.workload, result.dense),
                tokens_per_second(result.workload, timing),
            ]
            if benchmark.model.output:
                unit = "milliseconds"
                rates = [result.dense.e2el_ms.median, timing.e2el_ms.median]
            name = f"{workload_name(result)}, {unit}"
            numbers = [f"{rate:,.1f}" for rate in rates]
            rows.append(_Row([name, *numbers, f"{timing.speedup:.2f}x"]))
    return rows


def _hub_result(dataset: str, metric: str, value: float) -> HubResult:
    return HubResult(
        task_type="text-generation",
        dataset_type=_NOT_IN_HUB_NAME.sub("-", dataset),
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def _conditions(*runs: EvalResult | BenchResult | None) -> list[str]:
    """Say where and in which data type the results were measured, once for those that agree."""
    notes = []
    for run in runs:
        if run:
            where = f"in {run.dtype} on {run.device} ({run.processor})"
            notes.append(f"Measured with sleb {run.sleb_version} {where}.")
    return list(dict.fromkeys(notes))


def _table(table: Table) -> list[str]:
    if not table.rows:
        return []
    lines = ["", f"**{table.title}**", "", *to_markdown(table)]
    for note in table.notes:
        lines += ["", in_markdown(note)]
    return lines


def _sample_generation(sample: SampleGeneration) -> list[str]:
    lines = []
    for warning in search_results.collapse_warnings(sample):
        lines += ["", f"**{warning}**"]
    prompt = in_markdown(sample.prompt)
    lines += [
        "",
        f'At the end of the search, both models {sample.verb} "{prompt}" greedily as follows; '
        '"repeated" is the share of runs of 4 tokens that occurred before:',
        "",
        "```text",
    ]
    for who, repeated, text in search_results.sample_rows(sample):
        line = f"{who} ({repeated}): {' '.join(text.split())}"
        lines.append(line.replace("`", "'"))  # or a text could close the fence
    return [*lines, "```"]


def _recovery(order: Order, recovery: RecoveryRecord, output: OutputKind | None) -> list[str]:
    published = recovery.published()
    text = in_markdown(str(published.train_text))
    about = (
        f"The {order.recovered} were given new weights on {text}, to bring the model closer to the "
        f"base model."
    )
    return ["", about, *_table(search_results.recovery(published, output))]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["", "The checkpoint was written without a proof (`--no-verify`)."]
    lines = []
    if proof.partial:
        lines += ["", f"**The proof is partial**: {proof.partial}."]
    lines += ["", f"Checked after saving, in {proof.dtype} on {proof.device}:", ""]
    for clause in check_clauses(proof, "the base model"):
        lines.append(f"- {clause}")
    return lines
