"""What is known of a plan: how it was found, what it costs, what it gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sleb_cli.atomic import to_json
from sleb_cli.engine.output.measured import S, of_size
from sleb_cli.plan import Plan
from sleb_cli.results import (
    BenchResult,
    EvalResult,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    PrunedTiming,
    Removals,
    TaskResult,
    TextResult,
    WorkloadResult,
)
from sleb_cli.tables.quality import Estimate, is_canary, kept, main_tasks, task_names, text_names
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Scored, by_model
from sleb_cli.units import in_shell
from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import Pruning


@dataclass(frozen=True)
class Findings:
    """A plan and what was measured of its sizes.

    Attributes:
        file: the plan's file, as the user named it.
    """

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
        """The plan as a shell takes it, without its folder, because other people may read the command."""
        return in_shell(self.file.name)

    @property
    def removed(self) -> tuple[int, int, str]:
        """How many parts went, of how many, and what they are."""
        if experts := self.plan.experts:
            return experts.fewer, experts.count, "experts of each block"
        return len(self.plan.removals), self.plan.model.blocks, "blocks"

    def own(self, entries: Iterable[S]) -> S | None:
        """Return the entry for the plan's removals, if there is one."""
        return of_size(entries, self.plan.largest)

    @property
    def texts(self) -> Sequence[TextResult]:
        """The texts whose perplexity was measured."""
        return self.evaluation.texts if self.evaluation else ()

    @cached_property
    def text_names(self) -> list[str]:
        """The names of the texts, and whether the pruned model was made on them."""
        return text_names(self.texts, self.made_on)

    def made_on(self, text: TextResult) -> list[str]:
        """Return what was done on this text besides measuring."""
        from sleb_cli.engine.text.overlap import is_known  # which imports datasets

        recovery = self.plan.recovery
        used = {"searched on": self.plan.calibration} | ({"recovered on": recovery.train_text} if recovery else {})
        return [what for what, record in used.items() if is_known(text.text, text.tokens_sha256, record)]

    @cached_property
    def own_texts(self) -> list[tuple[str, TextResult, PrunedTextScores]]:
        """The name of each text, and its scores at the plan's size."""
        named = zip(self.text_names, self.texts, strict=True)
        return [(name, text, scores) for name, text in named if (scores := self.own(text.pruned))]

    @cached_property
    def scored(self) -> dict[str, list[Scored]]:
        """Each text, each metric of each task, and each workload on each model."""
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
        """One metric of each task that an average is taken over, and its scores at the plan's size.

        Each counts items that are right, and none is made to break.
        """
        main = main_tasks(task for task in self.tasks if self.own(task.pruned) and not is_canary(task))
        return [(task, own) for task in main if (own := self.own(task.pruned)) and own.lost is not None]

    def retention(self, removals: Removals) -> Estimate | None:
        """Return the mean accuracy as a share of the dense model's; None if a task was not measured at this size."""
        return kept([task for task, _ in self.accuracy_tasks], removals)

    @property
    def workloads(self) -> Sequence[WorkloadResult]:
        """The timed workloads."""
        return self.benchmark.workloads if self.benchmark else ()

    @cached_property
    def main_workloads(self) -> list[tuple[WorkloadResult, PrunedTiming]]:
        """One workload of each name, and its times at the plan's size.

        With an interval, of the most tokens: small ones are decided by what a machine does around the work.
        """

        def order(found: tuple[WorkloadResult, PrunedTiming]) -> tuple[bool, int]:
            workload = found[0].workload
            tokens = workload.batch_size * (workload.prompt_length + workload.new_tokens)
            return found[1].interval is None, -tokens

        measured = [(result, timing) for result in self.workloads if (timing := self.own(result.pruned))]
        of_name = ([each for each in measured if each[0].workload.name == name] for name in ("generation", "prompt"))
        return [min(found, key=order) for found in of_name if found]

    @property
    def sizes(self) -> tuple[ModelSize, ModelSize] | None:
        """The sizes of the dense and the pruned model, if they were measured."""
        pruned = self.benchmark and self.own(self.benchmark.pruned)
        return (self.benchmark.dense, pruned) if self.benchmark and pruned else None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was not measured, and the commands that do."""
        name, model = self.plan_argument, in_shell(self.plan.model.id)
        sizes = "" if self.plan.recovery else " --every 2"  # recovered weights are those of one size
        gaps = [
            (self.own_texts, "perplexity and divergence on text", f"sleb eval {name}{sizes}"),
            (self.tasks, "accuracy on tasks", f"sleb eval {name}{sizes} --tasks piqa,arc_easy"),
            (self.main_workloads, "speed and memory", f"sleb bench {name} --every 2"),
            (self.plan.dense.held_out, "loss on held-out text", f"sleb search {model} --holdout 0.2 …"),
            (self.plan.sample_generation, "what both models say", f"sleb search {model} …"),
        ]
        return [(part, command) for found, part, command in gaps if not found]


def read_findings(pruning: Pruning) -> Findings:
    """Return what the description of a plan for exporters holds, as records.

    Raises:
        UsageError: it describes no plan.
    """
    if pruning.plan is None or pruning.plan_file is None:
        raise UsageError(f"{pruning.model} has no plan to describe.", hint="Name a plan of `sleb search`.")
    evaluation, benchmark = pruning.evaluation, pruning.benchmark
    return Findings(
        Plan.model_validate_json(to_json(pruning.plan)),
        pruning.plan_file,
        EvalResult.model_validate_json(to_json(evaluation)) if evaluation else None,
        BenchResult.model_validate_json(to_json(benchmark)) if benchmark else None,
    )
