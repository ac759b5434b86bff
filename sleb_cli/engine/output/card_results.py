"""What was measured of a checkpoint, for its model card: tables, entries for the Hub, and commands that check them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from huggingface_hub import EvalResult as HubResult

from sleb_cli.canaries import CANARIES
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.card_metadata import BY_US
from sleb_cli.engine.output.measured import measured_of_plan
from sleb_cli.engine.text.sources import EVALUATION_PRESETS
from sleb_cli.events import Notify, ignore
from sleb_cli.kept_results import IN_CHECKPOINT, read_kept
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, public_name
from sleb_cli.results import (
    BenchResult,
    EvalResult,
    TaskResult,
    TaskScores,
    TextResult,
    TextScores,
    Timing,
    WorkloadResult,
)
from sleb_cli.tables import quality, speed
from sleb_cli.tables.table import Scored, Table, in_markdown, to_markdown

M = TypeVar("M", TextResult, TaskResult, WorkloadResult)
S = TypeVar("S", TextScores, TaskScores, Timing)
R = TypeVar("R", EvalResult, BenchResult)

# What the Hub refuses in the name of a data set.
_NO_NAME = re.compile(r"[^\w.-]+")
HERE = "FOLDER"
"""What the commands call the checkpoint, wherever it is."""


@dataclass(frozen=True)
class Row(Generic[M, S]):
    """One measurement of the checkpoint, and the base model's, which is missing if it was measured alone."""

    result: EvalResult | BenchResult
    measured: M
    base: S | None
    own: S

    @property
    def setting(self) -> str:
        """The data type and the device."""
        return f"{self.result.dtype} on {self.result.device}"

    @property
    def options(self) -> tuple[str, ...]:
        """The options for the same data type and device."""
        return ("--dtype", self.result.dtype, "--device", self.result.device)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a checkpoint."""

    texts: Sequence[Row[TextResult, TextScores]] = ()
    tasks: Sequence[Row[TaskResult, TaskScores]] = ()
    workloads: Sequence[Row[WorkloadResult, Timing]] = ()


def measured_in(folder: Path, plan: Plan | None, notify: Notify = ignore) -> Measured:
    """Return what a checkpoint holds: results of its plan, where both models were measured, and then those of itself.

    Results of the plan are those of the weights as they were, so they say nothing of a recovered checkpoint. Results of
    itself count only while it has the weights that were measured.
    """
    evaluations = [*_results(EvalResult, IN_CHECKPOINT["eval"], folder, plan, notify)]
    benchmarks = [*_results(BenchResult, IN_CHECKPOINT["bench"], folder, plan, notify)]
    texts = (row for result, size in evaluations for row in _rows(result, result.texts, size))
    tasks = (row for result, size in evaluations for row in _rows(result, result.tasks, size))
    workloads = (row for result, size in benchmarks for row in _rows(result, result.workloads, size))
    return Measured(
        _first(texts, lambda row: (public_name(row.measured.text), *row.measured.key[1:], row.setting)),
        _first(tasks, lambda row: (*row.measured.key, row.setting)),
        _first(workloads, lambda row: (*row.measured.workload.identity, row.setting)),
    )


def _results(
    kind: type[R], own: str, folder: Path, plan: Plan | None, notify: Notify
) -> Iterator[tuple[R, frozenset[int] | None]]:
    """Yield the results of the plan with its removals, and those of the checkpoint as a model of its own."""
    if plan is not None and plan.recovery is None and plan.removals:
        of_plan = measured_of_plan(kind, folder / CHECKPOINT_PLAN, plan, ignore)
        if of_plan is not None:
            yield of_plan, frozenset(plan.removals)
    found = read_kept(kind, folder / own, notify)
    if found is not None:
        now = ModelSource(folder.name, folder, trust_remote_code=found.model.code is not None)
        behavior = found.behavior if isinstance(found, EvalResult) else None
        same = (found.model.fingerprint, found.model.code) == (now.fingerprint, now.code)
        if same and behavior in (None, now.behavior):
            yield found, None


def _rows(
    result: EvalResult | BenchResult, measured: Iterable[M], removed: frozenset[int] | None
) -> Iterator[Row[M, Any]]:
    """Yield what was measured of the base model without the `removed` blocks, or of the checkpoint as its own model."""
    for each in measured:
        if removed is None:
            yield Row(result, each, None, each.dense)
        for pruned in each.pruned:
            if frozenset(pruned.removals) == removed:
                yield Row(result, each, each.dense, pruned)


def _first(rows: Iterable[Row[M, S]], key: Callable[[Row[M, S]], object]) -> list[Row[M, S]]:
    """Return the first row for each key: what was measured of both models goes before the same of one."""
    found: dict[object, Row[M, S]] = {}
    for row in rows:
        found.setdefault(key(row), row)
    return list(found.values())


def hub_results(measured: Measured) -> list[HubResult]:
    """Return the entries of the card's `model-index`: perplexities and tasks of this checkpoint."""
    return [*map(_hub_text, measured.texts), *map(_hub_task, measured.tasks)]


def _hub_text(row: Row[TextResult, TextScores]) -> HubResult:
    text = row.measured
    preset = EVALUATION_PRESETS.get(text.text)
    name = public_name(text.text)
    is_dataset = "/" in name.partition(":")[0]
    path, config, split = [*(name.split(":") if is_dataset else [_NO_NAME.sub("-", name)]), "", ""][:3]
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=preset.path if preset else path,
        dataset_name=name,
        dataset_config=(preset.config if preset else config) or None,
        dataset_split=(preset.split if preset else split) or None,
        metric_type="perplexity",
        metric_name=f"perplexity, {quality.windows_of(text)}",
        metric_value=round(row.own.perplexity, 4),
        metric_args={BY_US: row.result.sleb_version, "dtype": row.result.dtype, "bos": text.bos},
    )


def _hub_task(row: Row[TaskResult, TaskScores]) -> HubResult:
    task = row.measured
    items = {"items": len(task.doc_ids)} if task.doc_ids else {}
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=_NO_NAME.sub("-", task.task),
        dataset_name=task.task,
        metric_type=task.metric,
        metric_name=task.metric if task.filter in ("", "none") else f"{task.metric} ({task.filter})",
        metric_value=round(row.own.value, 4),
        metric_args={
            BY_US: row.result.sleb_version, "dtype": row.result.dtype, "num_fewshot": task.num_fewshot, **items
        },
    )  # fmt: skip


def results_section(measured: Measured) -> list[str]:
    """Return the lines of the card that show what was measured, and how to check it."""
    rows: list[Row[Any, Any]] = [*measured.texts, *measured.tasks, *measured.workloads]
    if not rows:
        return []
    texts = _by_model(measured.texts, lambda text: f"{public_name(text.text)}, {quality.windows_of(text)}")
    tasks = _by_model(measured.tasks, quality.task_name)
    timed = _by_model(measured.workloads, speed.workload_name)
    tables = [
        quality.perplexities(texts),
        quality.tasks(tasks),
        speed.speeds(timed, rows[-1].result.model.blocks),
    ]
    made = dict.fromkeys(
        (row.result.sleb_version, row.result.torch, row.result.transformers, row.result.processor) for row in rows
    )
    return [
        "",
        "## Results",
        *(line for table in tables for line in card_table(table)),
        "",
        *(f"Measured with sleb {sleb}, torch {torch}, transformers {hf}; {where}." for sleb, torch, hf, where in made),
        "",
        "## Reproduce",
        "",
        f"With this checkpoint in {HERE}:",
        "",
        "```bash",
        *_commands(measured),
        "```",
    ]


def card_table(table: Table) -> list[str]:
    """Return the lines of a table under its title, with its notes; nothing without rows."""
    if not table.rows:
        return []
    return [
        "",
        f"**{table.title}**",
        "",
        *to_markdown(table),
        *(line for note in table.notes for line in ("", in_markdown(note))),
    ]


def _by_model(rows: Iterable[Row[M, S]], name: Callable[[M], str]) -> Iterator[Scored]:
    """Yield the scores of both models, with the names of what was measured and of the model."""
    for row in rows:
        label = f"{name(row.measured)}, {row.setting}"
        if row.base is not None:
            yield row.measured, label, "base model", row.base
        yield row.measured, label, "this model", row.own


def _commands(measured: Measured) -> list[str]:
    """Return a command for each setting: of lm-eval itself for its own tasks, else of sleb."""
    commands: dict[tuple[str, ...], dict[str, None]] = {}
    for words, name in (*map(_eval, measured.texts), *map(_task, measured.tasks), *map(_bench, measured.workloads)):
        commands.setdefault(words, {})[name] = None
    return [shlex.join([*words, *filter(None, [",".join(names)])]) for words, names in commands.items()]


def _eval(row: Row[TextResult, TextScores]) -> tuple[tuple[str, ...], str]:
    """Return a command but for the last word, and that: the text."""
    text = row.measured
    stride = ("--stride", str(text.stride)) if text.stride else ()
    bos = ("--bos",) if text.bos == "windows" else ()
    length = ("--sequence-length", str(text.sequence_length), "--max-windows", str(text.windows))
    return ("sleb", "eval", HERE, *length, *stride, *bos, *row.options, "--perplexity"), public_name(text.text)


def _task(row: Row[TaskResult, TaskScores]) -> tuple[tuple[str, ...], str]:
    task, result = row.measured, row.result
    limit = ("--limit", str(len(task.doc_ids))) if task.doc_ids else ()
    if task.task in CANARIES:
        return ("sleb", "eval", HERE, *row.options, *limit, "--tasks"), task.task
    model = ("--model", "hf", "--model_args", f"pretrained={HERE},dtype={result.dtype}", "--device", result.device)
    return ("lm-eval", "run", *model, "--num_fewshot", str(task.num_fewshot), *limit, "--tasks"), task.task


def _bench(row: Row[WorkloadResult, Timing]) -> tuple[tuple[str, ...], str]:
    workload = row.measured.workload
    engine = () if workload.engine == "transformers" else ("--engine", workload.engine)
    new = ("--new-tokens", str(workload.new_tokens)) if workload.new_tokens else ()
    sizes = ("--batch-size", str(workload.batch_size), "--prompt-length", str(workload.prompt_length), *new)
    flags = {"--compile": workload.compiled, "--static-cache": workload.static_cache}
    given = (flag for flag, is_set in flags.items() if is_set)
    return ("sleb", "bench", HERE, f"--{workload.name}", *sizes, *engine, *given, *row.options), ""
