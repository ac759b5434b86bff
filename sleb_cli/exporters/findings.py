"""A plan, and what was measured of it: its evaluation and benchmark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sleb_cli.atomic import to_json
from sleb_cli.engine.output.measured import S, of_size
from sleb_cli.order import SizeKey
from sleb_cli.plan import Plan, read_plan
from sleb_cli.requests import DEFAULT_SAMPLE_TOKENS
from sleb_cli.results import (
    BenchResult,
    CorpusResult,
    EvalResult,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
    TaskResult,
    TextResult,
    WorkloadResult,
)
from sleb_cli.tables.quality import Estimate, is_canary, main_tasks, retention, text_names
from sleb_cli.units import in_shell
from sleb_plugins.exporter import Pruning


@dataclass(frozen=True)
class Findings:
    """A plan and what was measured of its sizes; `file` is the plan's, as the user named it."""

    plan: Plan
    file: Path
    evaluation: EvalResult | None
    benchmark: BenchResult | None

    @property
    def short_model(self) -> str:
        """The model's name without its organization."""
        return self.plan.model.id.rpartition("/")[2]

    @property
    def plan_argument(self) -> str:
        """The plan's file name, quoted for a shell."""
        # Without its folder, since a report may be published.
        return in_shell(self.file.name)

    @cached_property
    def _has_place(self) -> bool:
        # Only the file has the folder; `plan` is the part of it that may be published.
        return read_plan(self.file).made_for.has_place

    @property
    def search_again(self) -> str:
        """The command that repeats the search, but for the name of its plan."""
        model = "" if self._has_place else " FOLDER"
        return f"sleb search{model} --config {self.plan_argument}"

    def at_plan_size(self, entries: Iterable[S]) -> S | None:
        """Return the entry for the plan's removals, if there is one."""
        return of_size(entries, self.plan.largest)

    @property
    def texts(self) -> Sequence[TextResult]:
        """The texts whose perplexity was measured."""
        return self.evaluation.texts if self.evaluation else ()

    @cached_property
    def text_names(self) -> list[str]:
        """The names of the texts, with remarks on where each was used before."""
        return text_names(self.texts, self.seen_in)

    def seen_in(self, text: TextResult) -> list[str]:
        """Return where this text was used before: search, recovery."""
        from sleb_cli.engine.text.overlap import is_known  # which imports datasets

        plan = self.plan
        uses = []
        if is_known(text.text, text.tokens_sha256, plan.calibration):
            uses.append("searched on")
        if plan.recovery and is_known(text.text, text.tokens_sha256, plan.recovery.train_text):
            uses.append("recovered on")
        return uses

    @cached_property
    def text_scores(self) -> list[tuple[str, TextResult, PrunedTextScores]]:
        """Each text with its name and its scores at the plan's size."""
        scored_texts = []
        for name, text in zip(self.text_names, self.texts, strict=True):
            scores = self.at_plan_size(text.pruned)
            if scores:
                scored_texts.append((name, text, scores))
        return scored_texts

    @property
    def tasks(self) -> Sequence[TaskResult]:
        """Every metric of every task."""
        return self.evaluation.tasks if self.evaluation else ()

    @cached_property
    def accuracy_tasks(self) -> list[tuple[TaskResult, PrunedTaskScores]]:
        """The tasks that the mean accuracy is taken over, with their scores at the plan's size.

        Their main metric counts right items; canaries, which break first, are left out.
        """
        scored_tasks = []
        measured = [task for task in self.tasks if self.at_plan_size(task.pruned)]
        for task in main_tasks(measured):
            scores = self.at_plan_size(task.pruned)
            if scores and scores.lost is not None and not is_canary(task):
                scored_tasks.append((task, scores))
        return scored_tasks

    def retention(self, removals: SizeKey) -> Estimate | None:
        """Return the mean accuracy as a share of the dense one; None if a task lacks this size."""
        return retention([task for task, _ in self.accuracy_tasks], removals)

    @property
    def corpora(self) -> Sequence[CorpusResult]:
        """Every measure of every corpus."""
        return self.evaluation.corpora if self.evaluation else ()

    @property
    def workloads(self) -> Sequence[WorkloadResult]:
        """The timed workloads."""
        return self.benchmark.workloads if self.benchmark else ()

    @cached_property
    def main_workloads(self) -> list[tuple[WorkloadResult, PrunedTiming]]:
        """One workload of each name, with its times at the plan's size."""
        workloads = []
        for name in ("generation", "prompt", "texts", "query"):
            timed = []
            for result in self.workloads:
                timing = self.at_plan_size(result.pruned)
                if timing and result.workload.name == name:
                    timed.append((result, timing))
            if timed:
                workloads.append(min(timed, key=_unlike_a_headline))
        return workloads

    @property
    def sizes(self) -> tuple[ModelSize, ModelSize] | None:
        """The sizes of the dense and the pruned model, if they were measured."""
        if self.benchmark is None:
            return None
        pruned = self.at_plan_size(self.benchmark.pruned)
        return (self.benchmark.dense, pruned) if pruned else None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was not measured, each with the command that measures it."""
        plan = self.plan_argument
        if not self._has_place:
            plan += " --model FOLDER"
        evaluate = f"sleb eval {plan}"
        if not self.plan.recovery:  # recovered weights fit one size only
            evaluate += " --every 2"
        reads = self.plan.model.output is not None
        gaps = []
        if reads and not self.evaluation:
            gaps.append(("quality on a corpus", f"{evaluate} --corpus …"))
        if not (reads or self.text_scores):
            gaps.append(("perplexity and divergence on text", evaluate))
        if not (reads or self.tasks):
            gaps.append(("accuracy on tasks", f"{evaluate} --tasks piqa,arc_easy"))
        if not self.main_workloads:
            gaps.append(("speed and memory", f"sleb bench {plan} --every 2"))
        if not self.plan.dense.held_out:
            gaps.append(
                ("loss on held-out text", f"{self.search_again} --holdout 0.2 -o held_out.json")
            )
        if not (reads or self.plan.sample_generation):
            sample = f"--sample-tokens {DEFAULT_SAMPLE_TOKENS}"
            gaps.append(("what both models say", f"{self.search_again} {sample} -o said.json"))
        return gaps


def _unlike_a_headline(timed: tuple[WorkloadResult, PrunedTiming]) -> tuple[bool, int]:
    """Sort workloads: first with an interval, then by the most tokens.

    A small workload mostly measures the overhead around the blocks.
    """
    result, timing = timed
    workload = result.workload
    tokens = workload.batch_size * (workload.prompt_length + workload.new_tokens)
    return timing.interval is None, -tokens


def read_comparison(pruning: Pruning) -> EvalResult | None:
    """Read what was measured of two models; None if the input describes a plan."""
    if pruning.plan is not None or not pruning.evaluation:
        return None
    return EvalResult.model_validate_json(to_json(pruning.evaluation))


def read_findings(pruning: Pruning) -> Findings:
    """Read the plan and results in an exporter's input back into records."""
    assert pruning.plan is not None  # `needs_model` is false
    assert pruning.plan_file is not None
    plan = Plan.model_validate_json(to_json(pruning.plan))
    evaluation = None
    if pruning.evaluation:
        evaluation = EvalResult.model_validate_json(to_json(pruning.evaluation))
    benchmark = None
    if pruning.benchmark:
        benchmark = BenchResult.model_validate_json(to_json(pruning.benchmark))
    return Findings(plan, pruning.plan_file, evaluation, benchmark)
