"""What does the README of a pruned checkpoint say?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCardData, metadata_load

from sleb_cli.engine.files.copying import holds_file
from sleb_cli.engine.output.measured import of_size
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.names import public_source
from sleb_cli.order import SizeKey
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, RecoveryRecord, SampleGeneration
from sleb_cli.records import Proof
from sleb_cli.results import ApplyResult, BenchResult, EvalResult
from sleb_cli.tables import search_results
from sleb_cli.tables.checks import check_clauses
from sleb_cli.tables.quality import perplexity_change, task_name, text_names
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Table, in_markdown, to_markdown
from sleb_cli.units import format_change, format_perplexity
from sleb_cli.version import __version__

CARD = "README.md"

_NOT_IN_HUB_NAME = re.compile(r"[^\w.-]+")


def model_card(
    subject: Subject,
    written: ApplyResult,
    evaluation: EvalResult | None,
    benchmark: BenchResult | None,
) -> str:
    """Write the README: base model, removed parts, search, results and proof, without names of
    local folders.
    """
    source, recovery = subject.architecture.source, written.recovery
    sample = subject.own_plan and subject.own_plan.sample_generation
    name = (
        f"`{source.id}` at revision `{source.revision}`"
        if source.revision
        else in_markdown(source.name)
    )
    lines = [
        _front_matter(subject, evaluation),
        f"# {in_markdown(source.name)} without {subject.surgery.cuts[0].description}",
        "",
        f"- Base model: {name}",
        *_removal(subject, recovery),
        *(f"- {cut.title}: {cut.change}" for cut in written.cuts),
        *_results(subject, recovery, evaluation, benchmark),
        *(_sample_generation(sample) if sample else []),
        *(_recovery(recovery) if recovery else []),
        *_proof(written.proof),
        "",
    ]
    return "\n".join(lines)


def _removal(subject: Subject, recovery: RecoveryRecord | None) -> list[str]:
    made, removals, plan = f"- Made by sleb {__version__}", subject.surgery.removals, subject.plan
    if removals:
        how = "no training" if recovery is None else "the others given new weights"
        return [
            f"- Blocks removed, in order, numbered from 0 in the base model: "
            f"{', '.join(map(str, removals))}",
            f"{made} (SLEB, arXiv:2402.09025): whole transformer blocks removed, {how}",
            *_search(subject),
        ]
    if plan is None or plan.order.whole_blocks:
        return [made]
    return [
        f"{made}: {plan.unit} removed, no training (`{CHECKPOINT_PLAN}` has those that went, and "
        f"every score)",
        f"- {plan.unit.capitalize()} chosen by {in_markdown(plan.search.metric)} on "
        f"{in_markdown(str(plan.calibration.published()))}",
        f"- {plan.order.caveat}",
    ]


def _front_matter(subject: Subject, evaluation: EvalResult | None) -> str:
    source, removals = subject.architecture.source, subject.surgery.size_key
    base = _base_front_matter(source.folder)
    results = [result for _, result in _evaluated(evaluation, removals)] if evaluation else []
    data = ModelCardData(
        base_model=source.id if source.revision else None,
        # The Hub knows adapter, merge, quantized and finetune: only the last is of the base model's
        # own kind, changed.
        base_model_relation="finetune" if source.revision else None,
        library_name="transformers",
        pipeline_tag=_word(base.get("pipeline_tag")) or "text-generation",
        license=_words(base.get("license")) or None,
        # A licence that the Hub does not know is "other", and these say which.
        license_name=_word(base.get("license_name")),
        license_link=_word(base.get("license_link")),
        language=_words(base.get("language")) or None,
        # Some programs write `base_model:` tags, which name the base of the base, not ours.
        tags=[
            "sleb",
            "pruned",
            *(tag for tag in _listed(base.get("tags")) if not tag.startswith("base_model:")),
        ],
        eval_results=results or None,
        model_name=subject.surgery.name if results else None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _base_front_matter(folder: Path) -> dict[str, Any]:
    try:
        return metadata_load(folder / CARD) or {} if holds_file(folder, CARD) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    # Norwegian is `no`, which YAML takes for false.
    return [word for word in ("no" if value is False else _word(value) for value in values) if word]


def _words(value: Any) -> Any:
    words = _listed(value)
    return words if isinstance(value, list) else next(iter(words), None)


def _search(subject: Subject) -> list[str]:
    if subject.plan is None:
        return ["- The blocks were chosen by hand."]
    search, where = subject.plan.search, "" if subject.own_plan else " of another model"
    metric = in_markdown(search.metric)
    return [
        f"- Found by {search.strategy} search{where}: metric {metric} (`{CHECKPOINT_PLAN}` has "
        f"every score)"
    ]


def _results(
    subject: Subject,
    recovery: RecoveryRecord | None,
    evaluation: EvalResult | None,
    benchmark: BenchResult | None,
) -> list[str]:
    removals, plan = subject.surgery.size_key, subject.own_plan
    rows, notes = list[list[str]](), dict[str, None]()
    for text, dense, pruned in _searched(plan) if plan and recovery is None else ():
        change = format_change(pruned / dense - 1)
        rows.append(
            [f"perplexity, {text}", format_perplexity(dense), format_perplexity(pruned), change]
        )
    rows += [row for row, _ in _evaluated(evaluation, removals)] if evaluation else []
    for result in benchmark.workloads if benchmark else ():
        if timing := of_size(result.pruned, removals):
            speeds = [f"{timed.tokens_per_second:,.1f}" for timed in (result.dense, timing)]
            rows.append(
                [f"{workload_name(result)}, tokens a second", *speeds, f"{timing.speedup:.2f}x"]
            )
    for run in (evaluation, benchmark):
        if run:
            notes[
                f"Measured with sleb {run.sleb_version} in {run.dtype} on {run.device} "
                f"({run.processor})."
            ] = None
    return _table(
        Table("Results", ["measured", "base model", "this model", "change"], rows, list(notes))
    )


def _searched(plan: Plan) -> Iterator[tuple[str, float, float]]:
    """Yield each text of the search, with its perplexity, dense and pruned."""
    if plan.parts is None:
        yield f"{plan.calibration.title} (searched on)", plan.dense.perplexity, plan.perplexity
        return
    for text in plan.parts.texts:
        role = "held out" if text.held_out else "searched on"
        yield f"{public_source(text.text)} ({role})", math.exp(text.dense), math.exp(text.pruned)


def _evaluated(evaluation: EvalResult, removals: SizeKey) -> Iterator[tuple[list[str], HubResult]]:
    """Yield a row of the table for each text and task, and the result in the Hub's form."""
    for name, text in zip(text_names(evaluation.texts), evaluation.texts, strict=True):
        if pruned := of_size(text.pruned, removals):
            perplexities = [format_perplexity(scores.perplexity) for scores in (text.dense, pruned)]
            row = [
                f"perplexity, {name}",
                *perplexities,
                format_change(perplexity_change(pruned)[0]),
            ]
            yield row, _hub_result(public_source(text.text), "perplexity", pruned.perplexity)
    for task in evaluation.tasks:
        if scores := of_size(task.pruned, removals):
            values = f"{task.dense.value:.4f}", f"{scores.value:.4f}", f"{scores.difference:+.4f}"
            yield [task_name(task), *values], _hub_result(task.task, task.metric, scores.value)


def _hub_result(dataset: str, metric: str, value: float) -> HubResult:
    return HubResult(
        task_type="text-generation",
        dataset_type=_NOT_IN_HUB_NAME.sub("-", dataset),
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def _table(table: Table) -> list[str]:
    if not table.rows:
        return []
    notes = [line for note in table.notes for line in ("", in_markdown(note))]
    return ["", f"**{table.title}**", "", *to_markdown(table), *notes]


def _sample_generation(sample: SampleGeneration) -> list[str]:
    rows = search_results.sample_rows(sample)
    lines = [f"{who} ({repeated}): {' '.join(text.split())}" for who, repeated, text in rows]
    prompt = in_markdown(sample.prompt)
    return [
        *(
            line
            for warning in search_results.collapse_warnings(sample)
            for line in ("", f"**{warning}**")
        ),
        "",
        f'At the end of the search, both models continued "{prompt}" greedily as follows; '
        f'"repeated" is the '
        "share of runs of 4 tokens that occurred before:",
        "",
        "```text",
        # A text with backticks could close the fence.
        *(line.replace("`", "'") for line in lines),
        "```",
    ]


def _recovery(recovery: RecoveryRecord) -> list[str]:
    published = recovery.published()
    text = in_markdown(str(published.train_text))
    about = f"The remaining blocks were given new weights on {text}, to bring the model closer to the base model."
    return ["", about, *_table(search_results.recovery(published))]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["", "The checkpoint was written without a proof (`--no-verify`)."]
    partial = ["", f"**The proof is partial**: {proof.partial}."] if proof.partial else []
    clauses = [f"- {clause}" for clause in check_clauses(proof, "the base model")]
    return [
        *partial,
        "",
        f"Checked after saving, in {proof.dtype} on {proof.device}:",
        "",
        *clauses,
    ]
