"""What was measured of a checkpoint, for its model card: tables, entries for the Hub, and commands that check them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import EvalResult as HubResult

from sleb_cli.canaries import CANARIES, INSTRUCTIONS
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.card_metadata import BY_US
from sleb_cli.engine.output.measured import measured_of_plan, parts_of
from sleb_cli.engine.text.sources import EVALUATION_PRESETS
from sleb_cli.events import Notify, ignore
from sleb_cli.kept_results import IN_CHECKPOINT, read_kept
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, public_name
from sleb_cli.results import BenchResult, EvalResult, TaskResult, TextResult, WorkloadResult
from sleb_cli.tables import quality, speed
from sleb_cli.tables.table import Scored, Table, in_markdown, to_markdown

R = TypeVar("R", EvalResult, BenchResult)

# What the Hub refuses in the name of a data set.
_NO_NAME = re.compile(r"[^\w.-]+")
HERE = "FOLDER"
"""What the commands call the checkpoint, wherever it is."""


@dataclass(frozen=True)
class Row:
    """One measurement of the checkpoint, and the base model's, which is missing if it was measured alone.

    `measured` is the result of a text, task or workload; `base` and `own` are its scores or timings.
    """

    result: EvalResult | BenchResult
    measured: Any
    base: Any
    own: Any

    @property
    def setting(self) -> str:
        """The data type and the device."""
        return f"{self.result.dtype} on {self.result.device}"

    @property
    def key(self) -> tuple[object, ...]:
        """What two measurements of the same have in common."""
        match self.measured:
            case TextResult() as text:
                return (public_name(text.text), *text.key[1:], self.setting)
            case TaskResult() as task:
                return (*task.key, self.setting)
        return (*self.measured.workload.identity, self.setting)


def measured_in(folder: Path, plan: Plan, notify: Notify) -> list[Row]:
    """Return what a checkpoint holds: results of its plan, where both models were measured, and then those of itself.

    Results of itself, and of the plan of a recovered one, count only while it has the weights that were measured. Of
    the same, the first counts.
    """
    found: dict[object, Row] = {}
    for row in (
        *_of_plan(EvalResult, folder, plan),
        *_of_itself(EvalResult, folder / IN_CHECKPOINT["eval"], notify),
        *_of_plan(BenchResult, folder, plan),
        *_of_itself(BenchResult, folder / IN_CHECKPOINT["bench"], notify),
    ):
        found.setdefault(row.key, row)
    return list(found.values())


def _of_plan(kind: type[R], folder: Path, plan: Plan) -> Iterator[Row]:
    if result := measured_of_plan(kind, folder / CHECKPOINT_PLAN, plan, ignore):
        if isinstance(result, EvalResult) and result.recovered not in (None, _here(folder, result).content_hash):
            return
        for each in parts_of(result):
            for pruned in each.pruned:
                if frozenset(pruned.removals) == frozenset(plan.removals):
                    yield Row(result, each, each.dense, pruned)


def _of_itself(kind: type[R], file: Path, notify: Notify) -> Iterator[Row]:
    if result := read_kept(kind, file, notify):
        now = _here(file.parent, result)
        behavior = result.behavior if isinstance(result, EvalResult) else None
        same = (result.model.fingerprint, result.model.code) == (now.fingerprint, now.code)
        if same and behavior in (None, now.content_hash):
            yield from (Row(result, each, None, each.dense) for each in parts_of(result))


def _here(folder: Path, result: EvalResult | BenchResult) -> ModelSource:
    """Return the checkpoint as it is now, with its own code if that was trusted."""
    return ModelSource(folder.name, folder, trust_remote_code=result.model.code is not None)


def _of(rows: Iterable[Row], kind: type) -> list[Row]:
    return [row for row in rows if isinstance(row.measured, kind)]


def hub_results(rows: Sequence[Row]) -> list[HubResult]:
    """Return the entries of the card's `model-index`: perplexities and tasks of this checkpoint."""
    return [*map(_hub_text, _of(rows, TextResult)), *map(_hub_task, _of(rows, TaskResult))]


def _hub_text(row: Row) -> HubResult:
    text: TextResult = row.measured
    preset = EVALUATION_PRESETS.get(text.text)
    name = public_name(text.text)
    is_dataset = "/" in name.partition(":")[0]
    path, config, split = [*(name.split(":") if is_dataset else [_NO_NAME.sub("-", name)]), "", ""][:3]
    if preset:
        path, config, split = preset.path, preset.config or "", preset.split
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=path,
        dataset_name=name,
        dataset_config=config or None,
        dataset_split=split or None,
        metric_type="perplexity",
        metric_name=f"perplexity, {quality.windows_of(text)}",
        metric_value=round(row.own.perplexity, 4),
        metric_args={BY_US: row.result.sleb_version, "dtype": row.result.dtype, "bos": text.bos},
    )


def _hub_task(row: Row) -> HubResult:
    task: TaskResult = row.measured
    args = {BY_US: row.result.sleb_version, "dtype": row.result.dtype, "num_fewshot": task.num_fewshot}
    return HubResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=_NO_NAME.sub("-", task.task),
        dataset_name=task.task,
        metric_type=task.metric,
        metric_name=task.metric if task.filter in ("", "none") else f"{task.metric} ({task.filter})",
        metric_value=round(row.own.value, 4),
        metric_args=args | ({"items": len(task.doc_ids)} if task.doc_ids else {}),
    )


def results_section(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the card that show what was measured, and how to check it."""
    if not rows:
        return []
    texts = _by_model(_of(rows, TextResult), lambda text: f"{public_name(text.text)}, {quality.windows_of(text)}")
    tasks = _by_model(_of(rows, TaskResult), quality.task_name)
    timed = _by_model(_of(rows, WorkloadResult), speed.workload_name)
    blocks = max(row.result.model.blocks for row in rows)  # of the dense model, not of the checkpoint
    tables = [quality.perplexities(texts), quality.tasks(tasks), speed.speeds(timed, blocks)]
    made = dict.fromkeys(
        tuple(map(in_markdown, (made.sleb_version, made.torch, made.transformers, made.processor)))
        for made in (row.result for row in rows)
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
        *_commands(rows),
        "```",
    ]


def card_table(table: Table) -> list[str]:
    """Return the lines of a table under its title, with its notes; nothing without rows."""
    if not table.rows:
        return []
    notes = [line for note in table.notes for line in ("", in_markdown(note))]
    return ["", f"**{table.title}**", "", *to_markdown(table), *notes]


def _by_model(rows: Iterable[Row], name: Callable[[Any], str]) -> Iterator[Scored]:
    """Yield the scores of both models, with the names of what was measured and of the model."""
    for row in rows:
        label = f"{name(row.measured)}, {row.setting}"
        if row.base is not None:
            yield row.measured, label, "base model", row.base
        yield row.measured, label, "this model", row.own


def _commands(rows: Sequence[Row]) -> list[str]:
    """Return a command for each setting: of lm-eval itself for its own tasks, else of sleb."""
    commands: dict[tuple[str, ...], dict[str, None]] = {}
    for row in (row for kind in (TextResult, TaskResult, WorkloadResult) for row in _of(rows, kind)):
        *words, name = _command(row)
        commands.setdefault(tuple(words), {})[name] = None
    joined = (shlex.join([*words, *filter(None, [",".join(names)])]) for words, names in commands.items())
    return [" ".join(line.split()).replace("`", "'") for line in joined]  # so that no name can close the fence


def _command(row: Row) -> list[str]:
    """Return the command that measures the same; the last word is the text or the task, or empty."""
    result, options = row.result, ["--dtype", row.result.dtype, "--device", row.result.device]
    match row.measured:
        case TextResult() as text:
            cut = ["--sequence-length", str(text.sequence_length), "--max-windows", str(text.windows)]
            cut += ["--bos"] if text.bos == "windows" else []
            return ["sleb", "eval", HERE, *cut, *options, "--perplexity", public_name(text.text)]
        case TaskResult() as task:
            limit = ["--limit", str(len(task.doc_ids))] if task.doc_ids else []
            if task.task in (*CANARIES, INSTRUCTIONS):
                chat = ["--apply-chat-template"] if task.chat else []
                return ["sleb", "eval", HERE, *options, *limit, *chat, "--tasks", task.task]
            model = ["--model", "hf", "--model_args", f"pretrained={HERE},dtype={result.dtype}"]
            few = ["--device", result.device]  # tasks of a group may have different numbers of examples
            few += ["--num_fewshot", str(task.num_fewshot)] if task.doc_ids or task.num_fewshot else []
            chat = ["--apply_chat_template"] if task.chat else []
            return ["lm-eval", "run", *model, *few, *limit, *chat, "--tasks", task.task]
    workload = row.measured.workload
    sizes = ["--batch-size", str(workload.batch_size), "--prompt-length", str(workload.prompt_length)]
    sizes += ["--new-tokens", str(workload.new_tokens)] if workload.new_tokens else []
    given = ["--compile"] if workload.compiled else []
    return ["sleb", "bench", HERE, f"--{workload.name}", *sizes, *given, *options, ""]
