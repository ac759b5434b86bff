"""Quality of the pruned model by metric and strategy, on one model and calibration text, as a table.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll-greedy,last] [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl (perplexity), and
tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py (zero-shot accuracy). Plans are kept in WORK, and
each result in WORK/quality.json as soon as it is measured, by the blocks that the model lacks. Methods with the same
removals are measured once, and the same command resumes a stopped run.
Those of --task-methods (or all) also run the tasks, --items of each.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from saved_work import LONG, TEXTS, TRAIN, Bench, markdown, paired, parser, say

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.door.evaluate import load_requested
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore
from sleb_cli.plan import Plan
from sleb_cli.requests import EvalRequest
from sleb_plugins.metrics.nll import NegativeLogLikelihood

TASKS = {"local_piqa": "PIQA", "local_arc_easy": "ARC-e", "local_winogrande": "WinoG.", "local_socialiqa": "SIQA"}
REFERENCE = "nll-greedy"


@dataclass(frozen=True)
class Method:
    """A way to choose blocks: options of `sleb search`, with {seed} replaced by each seed in turn."""

    label: str
    options: str
    seeds: tuple[int, ...] = (0,)
    each_size: bool = False
    """Whether each size needs its own search, because its plan does not hold the best removals of smaller sizes."""


METHODS = {
    "nll-greedy": Method("greedy, nll (SLEB)", "--metric nll"),
    "nll-oneshot": Method("one-shot, nll", "--metric nll --strategy oneshot"),
    "kl-greedy": Method("greedy, kl", "--metric kl"),
    "cosine-oneshot": Method("one-shot, cosine (as ShortGPT)", "--metric cosine --strategy oneshot"),
    "cosine-greedy": Method("greedy, cosine", "--metric cosine"),
    "angular-contiguous": Method("contiguous, angular (as PruneMe)", "--metric angular --strategy contiguous"),
    "magnitude-oneshot": Method("one-shot, magnitude", "--metric magnitude --strategy oneshot"),
    "random": Method("random, 5 seeds", "--metric random:{seed} --strategy oneshot", seeds=(0, 1, 2, 3, 4)),
    "nll-refine": Method("refine, nll", "--metric nll --strategy refine", each_size=True),
}
RACING = ("nll-greedy", "kl-greedy", "nll-refine")


class QualityBench(Bench):
    name = "quality"
    setting = ("samples", "length", "windows", "window_length", "items", "dtype", "fast")

    @cached_property
    def tasks(self) -> dict[str, LoadedTask]:
        folder = self.work / "tasks"
        subprocess.run([sys.executable, self.source / "make_tasks.py", folder], check=True)
        request = EvalRequest(
            tasks=tuple(TASKS), limit=self.options.items, include_path=folder, batch_size=self.options.task_batch
        )
        return {task.name: task for task in load_requested(request)}

    def plan(self, name: str, seed: int, size: int, *, search: bool = False) -> Plan | None:
        """Return the plan of a method; if there is none yet, search for it through the command line, or return None."""
        options, method = self.options, METHODS[name]
        searched = size if method.each_size else max(options.sizes)
        file = self.work / f"{name}-{seed}-{searched}.json"
        if not (search or file.exists()):
            return None
        given = ["--remove", searched, *method.options.format(seed=seed).split(), "--dtype", options.dtype]
        racing = ["--fast"] if options.fast and name in RACING else []
        return self.searched_plan(file, *given, "--calibration", self.source / TRAIN, *racing).first(size)

    def measure_model(self, removed: Sequence[int], wanted: Collection[str]) -> None:
        """Measure what is missing of these texts and tasks for the model without these blocks."""
        missing = [name for name in wanted if name not in self.of(removed)]
        if not missing:
            return
        say(f"without {removed}")
        surgery = plan_surgery(self.architecture, removed)
        model = load_pruned(surgery, *self.placed, ignore) if removed else self.load(self.architecture)
        with torch.inference_mode():
            for name in missing:
                if name in TEXTS:
                    result = window_losses(model, self.windows[name], self.options.batch)
                    say(f"  {name} {perplexity(result):.2f}")
                else:
                    scores = self.tasks[name].run(model, self.tokenizer, name, ignore, ProcessGroup())["results"][name]
                    result = [scores["acc,none"], scores["acc_stderr,none"]]
                    say(f"  {TASKS[name]} {result[0]:.3f}")
                self.save(removed, name, result)
        del model
        free_memory()

    def measure(self) -> None:
        """Search and measure what is missing: first all models on the texts, then the chosen ones on the tasks."""
        options = self.options
        chosen = options.methods if "all" in options.task_methods else options.task_methods
        plans = [
            (name, self.plan(name, seed, size, search=True).removals)
            for name in options.methods
            for seed, size in product(METHODS[name].seeds, options.sizes)
        ]
        self.measure_model((), TEXTS)
        for _, removed in plans:
            self.measure_model(removed, TEXTS)
        for removed in [removed for name, removed in plans if name in chosen]:
            self.measure_model((), TASKS)
            self.measure_model(removed, TASKS)

    def measured(self, size: int) -> dict[str, list[Plan]]:
        """Return the plans of each method, one for each seed, if their models are measured on the texts."""
        plans = {name: [self.plan(name, seed, size) for seed in METHODS[name].seeds] for name in self.options.methods}
        return {
            name: found
            for name, found in plans.items()
            if all(plan and TEXTS.keys() <= self.of(plan.removals).keys() for plan in found)
        }

    def report(self) -> Iterator[str]:
        yield (
            "Perplexity on windows of other encyclopaedia and of C4, drawn from all over the texts; differences in "
            "nats per token, paired over windows, with standard errors. Zero-shot accuracy with standard errors. "
            "Seconds are those of the search (one for the largest size where it serves the smaller ones)."
        )
        yield self.how_measured("sizes")
        for size in self.options.sizes:
            if plans := self.measured(size):
                yield f"### {size} of {self.architecture.block_count} blocks removed"
                yield table(self, plans)


def window_losses(model: Any, windows: torch.Tensor, batch: int) -> list[float]:
    """Return the mean nats per token of each window."""
    losses: list[float] = []
    for ids in torch.split(windows, batch):
        logits = model(input_ids=ids, use_cache=False).logits
        losses += score_logits(NegativeLogLikelihood(), logits, ids).tolist()
    return losses


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700))


def table(bench: QualityBench, plans: dict[str, list[Plan]]) -> str:
    """Return the Markdown table for one size."""
    found = {METHODS[name].label: [bench.of(plan.removals) for plan in of_seeds] for name, of_seeds in plans.items()}
    seconds = [statistics.fmean(plan.environment.seconds for plan in of_seeds) for of_seeds in plans.values()]
    reference = bench.of(plans[REFERENCE][0].removals) if REFERENCE in plans else None
    tasks = any(TASKS.keys() <= models[0].keys() for models in found.values())
    header = ["method", *(f"{name} perplexity" for name in TEXTS)]
    header += [f"{name}, nats more than SLEB" for name in TEXTS] if reference else []
    header += [*TASKS.values(), "mean"] if tasks else []
    lines = []
    for label, models in {"dense": [bench.of(())], **found}.items():
        cells = [label, *(spread([perplexity(model[text]) for model in models]) for text in TEXTS)]
        cells += [difference(models, reference, text) for text in TEXTS] if reference else []
        cells += accuracies(models) if tasks else []
        lines.append(cells)
    lines = [[*cells, taken] for cells, taken in zip(lines, ["", *(f"{each:.0f}" for each in seconds)], strict=True)]
    return markdown([*header, "seconds"], lines)


def spread(values: Sequence[float]) -> str:
    """Format a value, or the median and range of several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def difference(models: Sequence[dict[str, Any]], reference: dict[str, Any], text: str) -> str:
    differences = [paired(model[text], reference[text]) for model in models]
    mean = f"{statistics.fmean(mean for mean, _ in differences):+.3f}"
    return mean if len(models) > 1 else f"{mean} ± {differences[0][1]:.3f}"


def accuracies(models: Sequence[dict[str, Any]]) -> list[str]:
    measured = [model for model in models if TASKS.keys() <= model.keys()]
    if not measured:
        return [""] * (len(TASKS) + 1)
    values, errors = ([statistics.fmean(model[task][i] for model in measured) for task in TASKS] for i in (0, 1))
    mean_error = math.hypot(*errors) / len(errors)
    return [*(f"{value:.3f}" for value in values), f"{statistics.fmean(values):.3f} ± {mean_error:.3f}"]


def main() -> None:
    sizes = {"samples": 16, "batch": 4, "items": 300, "task_batch": 8}
    chosen = {"sizes": [3, 6, 9], "methods": list(METHODS), "task_methods": [], "fast": False}
    options = parser(__doc__, "model", "data", work="quality", **LONG, **sizes, **chosen).parse_args()
    QualityBench(options).run()


if __name__ == "__main__":
    main()
