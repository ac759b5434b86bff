"""What is known about a plan: its search, evaluation and benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sleb_cli.atomic import to_json
from sleb_cli.engine.output.measured import S, of_size
from sleb_cli.order import SizeKey
from sleb_cli.plan import Plan
from sleb_cli.results import (
    BenchResult,
    EvalResult,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
    TaskResult,
    TextResult,
    WorkloadResult,
)
from sleb_cli.tables.quality import (
    Estimate,
    is_canary,
    main_tasks,
    retention,
    task_names,
    text_names,
)
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Scored, by_model
from sleb_cli.units import in_shell
from sleb_plugins.errors import UsageError
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

        recovery = self.plan.recovery
        used = {"searched on": self.plan.calibration} | (
            {"recovered on": recovery.train_text} if recovery else {}
        )
        return [
            use for use, record in used.items() if is_known(text.text, text.tokens_sha256, record)
        ]

    @cached_property
    def text_scores(self) -> list[tuple[str, TextResult, PrunedTextScores]]:
        """Each text with its name and its scores at the plan's size."""
        named = zip(self.text_names, self.texts, strict=True)
        return [
            (name, text, scores)
            for name, text in named
            if (scores := self.at_plan_size(text.pruned))
        ]

    @cached_property
    def scored(self) -> dict[str, list[Scored]]:
        """Scores and times on each model: "text", "task" (by metric) and "workload"."""
        return {
            "text": by_model(self.texts, self.text_names),
            "task": by_model(self.tasks, task_names(self.tasks)),
            "workload": by_model(self.workloads, map(workload_name, self.workloads)),
        }

    @property
    def tasks(self) -> Sequence[TaskResult]:
        """Every metric of every task."""
        return self.evaluation.tasks if self.evaluation else ()

    @cached_property
    def accuracy_tasks(self) -> list[tuple[TaskResult, PrunedTaskScores]]:
        """The tasks that the mean accuracy is taken over, with their scores at the plan's size.

        Their main metric counts right items; canaries, which break first, are left out.
        """
        main = main_tasks(
            task for task in self.tasks if self.at_plan_size(task.pruned) and not is_canary(task)
        )
        scored = [(task, scores) for task in main if (scores := self.at_plan_size(task.pruned))]
        return [(task, scores) for task, scores in scored if scores.lost is not None]

    def retention(self, removals: SizeKey) -> Estimate | None:
        """Return the mean accuracy as a share of the dense model's; None if a task was not measured
        at this size.
        """
        return retention([task for task, _ in self.accuracy_tasks], removals)

    @property
    def workloads(self) -> Sequence[WorkloadResult]:
        """The timed workloads."""
        return self.benchmark.workloads if self.benchmark else ()

    @cached_property
    def main_workloads(self) -> list[tuple[WorkloadResult, PrunedTiming]]:
        """One generation and one prompt workload, with their times at the plan's size."""

        def order(timed: tuple[WorkloadResult, PrunedTiming]) -> tuple[bool, int]:
            result, timing = timed
            workload = result.workload
            # The most tokens: a small workload mostly measures the overhead around the blocks.
            return timing.interval is None, -workload.batch_size * (
                workload.prompt_length + workload.new_tokens
            )

        timed = [
            (result, timing)
            for result in self.workloads
            if (timing := self.at_plan_size(result.pruned))
        ]
        by_name = (
            [pair for pair in timed if pair[0].workload.name == name]
            for name in ("generation", "prompt")
        )
        return [min(pairs, key=order) for pairs in by_name if pairs]

    @property
    def sizes(self) -> tuple[ModelSize, ModelSize] | None:
        """The sizes of the dense and the pruned model, if they were measured."""
        pruned = self.benchmark and self.at_plan_size(self.benchmark.pruned)
        return (self.benchmark.dense, pruned) if self.benchmark and pruned else None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was not measured, each with the command that measures it."""
        name, model = self.plan_argument, in_shell(self.plan.model.id)
        sizes = "" if self.plan.recovery else " --every 2"  # recovered weights fit one size only
        gaps = [
            (self.text_scores, "perplexity and divergence on text", f"sleb eval {name}{sizes}"),
            (self.tasks, "accuracy on tasks", f"sleb eval {name}{sizes} --tasks piqa,arc_easy"),
            (self.main_workloads, "speed and memory", f"sleb bench {name} --every 2"),
            (
                self.plan.dense.held_out,
                "loss on held-out text",
                f"sleb search {model} --holdout 0.2 …",
            ),
            (self.plan.sample_generation, "what both models say", f"sleb search {model} …"),
        ]
        return [(name, command) for measured, name, command in gaps if not measured]


def read_findings(pruning: Pruning) -> Findings:
    """Read the plan and results in an exporter's input back into records.

    Raises:
        UsageError: it describes no plan.
    """
    if pruning.plan is None or pruning.plan_file is None:
        raise UsageError(
            f"{pruning.model} has no plan to describe.", hint="Name a plan of `sleb search`."
        )
    evaluation, benchmark = pruning.evaluation, pruning.benchmark
    return Findings(
        Plan.model_validate_json(to_json(pruning.plan)),
        pruning.plan_file,
        EvalResult.model_validate_json(to_json(evaluation)) if evaluation else None,
        BenchResult.model_validate_json(to_json(benchmark)) if benchmark else None,
    )
