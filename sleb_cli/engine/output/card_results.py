"""What was measured of a checkpoint, for its model card: tables, entries for the Hub, and commands that check them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from huggingface_hub import EvalResult as HubResult

from sleb_cli.atomic import to_json
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
    Interval,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
    TaskResult,
    TaskScores,
    TextResult,
    TextScores,
    Timing,
    WorkloadResult,
)
from sleb_cli.units import format_perplexity

M = TypeVar("M", TextResult, TaskResult, WorkloadResult)
S = TypeVar("S", TextScores, TaskScores, Timing)
R = TypeVar("R", EvalResult, BenchResult)

# What the Hub refuses in the name of a data set.
_NO_NAME = re.compile(r"[^\w.-]+")
HERE = "FOLDER"
"""What the commands call the checkpoint, wherever it is."""


@dataclass(frozen=True)
class Row(Generic[M, S]):
    """One measurement of the checkpoint, in this data type on this kind of device, and the base model's beside it.

    `version` is that of sleb. The base model has none if the checkpoint was measured alone.
    """

    version: str
    dtype: str
    device: str
    measured: M
    base: S | None
    own: S

    @property
    def setting(self) -> str:
        """The data type and the device."""
        return f"{self.dtype} on {self.device}"


@dataclass(frozen=True)
class Measured:
    """All that was measured of a checkpoint."""

    texts: Sequence[Row[TextResult, TextScores]] = ()
    tasks: Sequence[Row[TaskResult, TaskScores]] = ()
    workloads: Sequence[Row[WorkloadResult, Timing]] = ()
    versions: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.texts or self.tasks or self.workloads)


def measured_in(folder: Path, plan: Plan | None, notify: Notify = ignore) -> Measured:
    """Return what a checkpoint holds: results of its plan, where both models were measured, and then those of itself.

    Results of the plan are those of the weights as they were, so they say nothing of a recovered checkpoint. Results of
    itself count only while it has the weights that were measured.
    """
    removed = None if plan is None or plan.recovery is not None else frozenset(plan.removals)
    evaluations = [
        *_of_plan(EvalResult, "eval", folder, plan, removed),
        *_of_itself(EvalResult, "eval", folder, notify),
    ]
    benchmarks = [
        *_of_plan(BenchResult, "bench", folder, plan, removed),
        *_of_itself(BenchResult, "bench", folder, notify),
    ]
    texts = [row for result, size in evaluations for row in _rows(result, result.texts, size)]
    tasks = [row for result, size in evaluations for row in _rows(result, result.tasks, size)]
    workloads = [row for result, size in benchmarks for row in _rows(result, result.workloads, size)]
    return Measured(
        _first(texts, lambda row: (public_name(row.measured.text), *row.measured.key[1:], row.setting)),
        _first(tasks, lambda row: (*row.measured.key, row.setting)),
        _first(workloads, lambda row: (*row.measured.workload.identity, row.setting)),
        list(
            dict.fromkeys([*(_versions(each) for each, _ in evaluations), *(_versions(each) for each, _ in benchmarks)])
        ),
    )


def _of_plan(
    kind: type[R], name: Literal["eval", "bench"], folder: Path, plan: Plan | None, removed: frozenset[int] | None
) -> list[tuple[R, frozenset[int] | None]]:
    data = measured_of_plan(folder / CHECKPOINT_PLAN, plan, name, ignore) if plan and removed else None
    return [(kind.model_validate_json(to_json(data)), removed)] if data else []


def _of_itself(
    kind: type[R], name: Literal["eval", "bench"], folder: Path, notify: Notify
) -> list[tuple[R, frozenset[int] | None]]:
    found = read_kept(kind, folder / IN_CHECKPOINT[name], notify)
    if found is None:
        return []
    now = ModelSource(folder.name, folder, trust_remote_code=found.model.code is not None)
    same = (found.model.fingerprint, found.model.code) == (now.fingerprint, now.code)
    if isinstance(found, EvalResult) and found.behavior is not None:
        same = same and found.behavior == now.behavior
    return [(found, None)] if same else []


def _rows(
    result: EvalResult | BenchResult, measured: Iterable[M], removed: frozenset[int] | None
) -> Iterable[Row[M, Any]]:
    """Yield what was measured of the base model without the `removed` blocks, or of the checkpoint as its own model."""
    for each in measured:
        if removed is None:
            yield Row(result.sleb_version, result.dtype, result.device, each, None, each.dense)
        for pruned in each.pruned:
            if frozenset(pruned.removals) == removed:
                yield Row(result.sleb_version, result.dtype, result.device, each, each.dense, pruned)


def _first(rows: Iterable[Row[M, S]], key: Callable[[Row[M, S]], object]) -> list[Row[M, S]]:
    """Return the first row for each key: what was measured of both models goes before the same of one."""
    found: dict[object, Row[M, S]] = {}
    for row in rows:
        found.setdefault(key(row), row)
    return list(found.values())


def _versions(result: EvalResult | BenchResult) -> str:
    return f"sleb {result.sleb_version}, torch {result.torch}, transformers {result.transformers}; {result.processor}"


def hub_results(measured: Measured) -> list[HubResult]:
    """Return the entries of the card's `model-index`: perplexities and tasks of this checkpoint."""
    return [*map(_hub_text, measured.texts), *map(_hub_task, measured.tasks)]


def _hub_text(row: Row[TextResult, TextScores]) -> HubResult:
    text = row.measured
    preset = EVALUATION_PRESETS.get(text.text)
    name = public_name(text.text)
    path, config, split = [*(name.split(":") if _is_dataset(name) else [_NO_NAME.sub("-", name)]), "", ""][:3]
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=preset.path if preset else path,
        dataset_name=name,
        dataset_config=(preset.config if preset else config) or None,
        dataset_split=(preset.split if preset else split) or None,
        metric_type="perplexity",
        metric_name=f"perplexity, {_windows(text)}",
        metric_value=round(row.own.perplexity, 4),
        metric_args={BY_US: row.version, "dtype": row.dtype, "bos": text.bos},
    )


def _hub_task(row: Row[TaskResult, TaskScores]) -> HubResult:
    task = row.measured
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=_NO_NAME.sub("-", task.task),
        dataset_name=task.task,
        metric_type=task.metric,
        metric_name=_metric(task),
        metric_value=round(row.own.value, 4),
        metric_args={
            BY_US: row.version,
            "dtype": row.dtype,
            "num_fewshot": task.num_fewshot,
            **({"items": len(task.doc_ids)} if task.doc_ids else {}),
        },
    )


def _is_dataset(text: str) -> bool:
    return "/" in text.partition(":")[0]


def _windows(text: TextResult) -> str:
    stride = f", stride {text.stride}" if text.stride else ""
    return f"{text.windows} windows of {text.sequence_length} tokens{stride}"


def _metric(task: TaskResult) -> str:
    return task.metric if task.filter in ("", "none") else f"{task.metric} ({task.filter})"


def results_section(measured: Measured) -> list[str]:
    """Return the lines of the card that show what was measured, and how to check it."""
    if not measured:
        return []
    return [
        "",
        "## Results",
        *_table(
            ("text", "windows", "in", "base model", "this model", "ln ratio"),
            [
                (
                    in_markdown(public_name(row.measured.text)), _windows(row.measured), row.setting,
                    format_perplexity(row.base.perplexity) if row.base else "",
                    format_perplexity(row.own.perplexity), _log_ratio(row.own),
                )
                for row in measured.texts
            ],
            "Perplexity; the ratio of both is in nats per token, with its 95 % interval.",
        ),
        *_table(
            ("task", "metric", "items", "in", "base model", "this model", "difference"),
            [
                (
                    in_markdown(row.measured.task),
                    f"{in_markdown(_metric(row.measured))}, {row.measured.num_fewshot}-shot",
                    str(len(row.measured.doc_ids) or ""), row.setting, f"{row.base.value:.4f}" if row.base else "",
                    f"{row.own.value:.4f}{_between(row.own.interval)}", _difference(row.own),
                )
                for row in measured.tasks
            ],
            "Tasks of lm-eval; brackets hold 95 % intervals, which for the difference are those of the same items.",
        ),
        *_table(
            ("workload", "in", "base model", "this model", "speedup"),
            [
                (
                    in_markdown(str(row.measured.workload)), f"{row.setting}{_engine(row.measured)}",
                    _rate(row.base) if row.base else "", _rate(row.own), _speedup(row.own),
                )
                for row in measured.workloads
            ],
            "Tokens per second, from the median time; the speedup has a 95 % interval.",
        ),
        "",
        *(f"Measured with {versions}." for versions in measured.versions),
        *_reproduce(measured),
    ]  # fmt: skip


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> list[str]:
    """Return a table in Markdown, without its empty columns; nothing without rows."""
    if not rows:
        return []
    shown = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["", caption, "", *("| " + " | ".join(line[number] for number in shown) + " |" for line in lines)]


def in_code(name: str) -> str:
    """Return a name as code in Markdown, on one line."""
    one_line = " ".join(name.split()).replace("`", "'")
    return f"`{one_line}`"


def in_markdown(name: str) -> str:
    """Return a name on one line, so that Markdown shows it as it is, in a table, too."""
    one_line = " ".join(name.split()).replace("`", "'")
    return re.sub(r"([\\*\[\]<>|])", r"\\\1", one_line)


def _between(interval: Interval | None, digits: int = 3) -> str:
    return f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval else ""


def _log_ratio(scores: TextScores) -> str:
    return f"{scores.log_ratio:+.4f}{_between(scores.interval, 4)}" if isinstance(scores, PrunedTextScores) else ""


def _difference(scores: TaskScores) -> str:
    if not isinstance(scores, PrunedTaskScores):
        return ""
    return f"{scores.difference:+.4f}{_between(scores.difference_interval, 4)}"


def _rate(timing: Timing) -> str:
    return f"{timing.output_throughput or timing.total_token_throughput:,.1f}"


def _speedup(timing: Timing) -> str:
    return f"{timing.speedup:.2f}x{_between(timing.interval, 2)}" if isinstance(timing, PrunedTiming) else ""


def _engine(measured: WorkloadResult) -> str:
    engine = measured.workload.engine
    return "" if engine == "transformers" else f", {engine} {measured.engine_version or ''}".rstrip()


def _reproduce(measured: Measured) -> list[str]:
    commands = [*_text_commands(measured.texts), *_task_commands(measured.tasks), *_bench_commands(measured.workloads)]
    return ["", "## Reproduce", "", f"With this checkpoint in {HERE}:", "", "```bash", *commands, "```"]


def _text_commands(rows: Sequence[Row[TextResult, TextScores]]) -> list[str]:
    def options(row: Row[TextResult, TextScores]) -> list[str]:
        text = row.measured
        stride = ["--stride", str(text.stride)] if text.stride else []
        bos = ["--bos"] if text.bos == "windows" else []
        length = ["--sequence-length", str(text.sequence_length), "--max-windows", str(text.windows)]
        return [*length, *stride, *bos, *_machine(row)]

    return [
        _command(
            "sleb", "eval", HERE, "--perplexity", ",".join(public_name(row.measured.text) for row in alike), *words
        )
        for words, alike in _alike(rows, options)
    ]


def _task_commands(rows: Sequence[Row[TaskResult, TaskScores]]) -> list[str]:
    """Return a command for each setting: of lm-eval itself, or of sleb for tasks that lm-eval does not have."""

    def options(row: Row[TaskResult, TaskScores]) -> list[str]:
        task = row.measured
        limit = ["--limit", str(len(task.doc_ids))] if task.doc_ids else []
        if task.task in CANARIES:
            return ["sleb", "eval", HERE, *_machine(row), *limit, "--tasks"]
        model = ["--model", "hf", "--model_args", f"pretrained={HERE},dtype={row.dtype}", "--device", row.device]
        return ["lm-eval", "run", *model, "--num_fewshot", str(task.num_fewshot), *limit, "--tasks"]

    return [
        _command(*words, ",".join(dict.fromkeys(row.measured.task for row in alike)))
        for words, alike in _alike(rows, options)
    ]


def _bench_commands(rows: Sequence[Row[WorkloadResult, Timing]]) -> list[str]:
    def options(row: Row[WorkloadResult, Timing]) -> list[str]:
        workload = row.measured.workload
        engine = [] if workload.engine == "transformers" else ["--engine", workload.engine]
        new = ["--new-tokens", str(workload.new_tokens)] if workload.new_tokens else []
        sizes = ["--batch-size", str(workload.batch_size), "--prompt-length", str(workload.prompt_length), *new]
        flags = {"--compile": workload.compiled, "--static-cache": workload.static_cache}
        given = [flag for flag, is_set in flags.items() if is_set]
        return [f"--{workload.name}", *sizes, *engine, *given, *_machine(row)]

    return [_command("sleb", "bench", HERE, *words) for words, _ in _alike(rows, options)]


def _machine(row: Row[Any, Any]) -> list[str]:
    return ["--dtype", row.dtype, "--device", row.device]


def _alike(
    rows: Sequence[Row[M, S]], options: Callable[[Row[M, S]], list[str]]
) -> list[tuple[list[str], list[Row[M, S]]]]:
    """Return the rows by the options of the command that measures them."""
    ordered = sorted(rows, key=options)
    return [(words, list(alike)) for words, alike in groupby(ordered, key=options)]


def _command(*words: str) -> str:
    return shlex.join(words)
