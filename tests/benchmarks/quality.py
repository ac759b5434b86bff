"""Quality of the pruned model by metric and strategy, on one model and calibration text, as a table and a plot.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll-greedy,last] [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl (perplexity), and
tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py (zero-shot accuracy). Each result is saved to
WORK/quality.json as soon as it is measured: searches by their settings, models by the blocks that they lack. Methods
with the same removals are measured once, and the same command resumes a stopped run.
Those of --task-methods (or all) also run the tasks, --items of each. --plot FILE draws the plot.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from saved_work import (
    DENSE,
    TEXTS,
    TRAIN,
    Bench,
    how_measured,
    markdown,
    paired,
    parser,
    require_known,
    run_saved,
    say,
)

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.tasks import load_requested
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.text.windows import cut_running_text
from sleb_cli.events import ignore
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
    "taylor-oneshot": Method("one-shot, taylor", "--metric taylor --strategy oneshot"),
    "magnitude-oneshot": Method("one-shot, magnitude", "--metric magnitude --strategy oneshot"),
    "last": Method("last", "--strategy last"),
    "random": Method("random, 5 seeds", "--metric random:{seed} --strategy oneshot", seeds=(0, 1, 2, 3, 4)),
    "nll-beam": Method("beam, nll", "--metric nll --strategy beam"),
    "nll-refine": Method("refine, nll", "--metric nll --strategy refine", each_size=True),
}
RACING = ("nll-greedy", "kl-greedy", "nll-beam", "nll-refine")


def key_of(removals: Sequence[int]) -> str:
    """Return the name of a model by the blocks it lacks, in any order of removal."""
    return ",".join(map(str, sorted(removals))) or DENSE


class QualityBench(Bench):
    def __init__(self, options: argparse.Namespace) -> None:
        setting = {
            "calibration": [options.samples, options.length],
            "fast": options.fast,
            "windows": [options.windows, options.window_length],
            "items": options.items,
            "dtype": options.dtype,
        }
        super().__init__(options, "quality", setting, ("searches", "models"))

    def searched(self, name: str, size: int, seed: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the size whose search found this one, and the search; both empty if there is none."""
        searches = self.work.data["searches"].get(f"{name}/{seed}", {}).items()
        return next((found for found in searches if str(size) in found[1].get("removals", {})), ("", {}))

    def removals(self, name: str, size: int, seed: int) -> tuple[int, ...] | None:
        """Return the blocks that a method removes, if its search is done."""
        _, search = self.searched(name, size, seed)
        return tuple(search["removals"][str(size)]) if search else None

    def seconds(self, name: str, size: int) -> float:
        """Return the mean seconds of a search over the seeds; one for a larger size serves the smaller ones."""
        searches = [self.searched(name, size, seed)[1] for seed in METHODS[name].seeds]
        return statistics.fmean(search["seconds"] for search in searches if search)

    def model(self, key: str) -> dict[str, Any]:
        return self.work.data["models"].setdefault(key, {"losses": {}, "tasks": {}})

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        return self.drawn_windows(lambda text: cut_running_text(self.tokenizer, text, self.options.window_length))

    @cached_property
    def tasks(self) -> tuple[LoadedTask, ...]:
        folder = self.work.folder / "tasks"
        subprocess.run([sys.executable, self.options.data / "make_tasks.py", folder], check=True)
        request = EvalRequest(
            tasks=tuple(TASKS), limit=self.options.items, include_path=folder, batch_size=self.options.task_batch
        )
        return load_requested(request)

    def search(self, name: str, seed: int, size: int) -> None:
        """Search with one method through the command line; resume an interrupted search."""
        options = self.options
        found = self.work.data["searches"].setdefault(f"{name}/{seed}", {}).setdefault(str(size), {"seconds": 0.0})
        plan_file = self.work.folder / f"{name}-{seed}-{size}.json"
        say(f"search {name}, seed {seed}, {size} blocks")
        start = time.monotonic()
        given = ["--remove", size, *METHODS[name].options.format(seed=seed).split(), "--dtype", options.dtype]
        racing = ["--fast"] if options.fast and name in RACING else []
        try:
            plan = self.searched_plan(plan_file, *given, "--calibration", options.data / TRAIN, *racing)
        finally:
            found["seconds"] += time.monotonic() - start
        sizes = [size] if METHODS[name].each_size else range(1, size + 1)
        found["removals"] = {str(count): list(plan.first(count).removals) for count in sizes}
        self.work.save()

    def measure(self, removals: Sequence[int], *, with_tasks: bool) -> None:
        """Measure what is missing for the model without these blocks."""
        key = key_of(removals)
        have = self.model(key)
        texts = [name for name in TEXTS if name not in have["losses"]]
        tasks_missing = with_tasks and not have["tasks"]
        if not (texts or tasks_missing):
            return
        say(f"measure {key}")
        surgery = plan_surgery(self.architecture, removals)
        model = load_pruned(surgery, *self.placed, ignore) if removals else self.load(self.architecture)
        with torch.inference_mode():
            for name in texts:
                have["losses"][name] = window_losses(model, self.windows[name], self.options.batch)
                self.work.save()
            say("  " + ", ".join(f"{name} {perplexity(losses):.2f}" for name, losses in have["losses"].items()))
            if tasks_missing:
                for task in self.tasks:
                    name, scores = task.name, task.run(model, self.tokenizer, key, ignore)["results"][task.name]
                    have["tasks"][name] = [scores["acc,none"], scores["acc_stderr,none"]]
                self.work.save()
                say("  " + ", ".join(f"{TASKS[task]} {value:.3f}" for task, (value, _) in have["tasks"].items()))
        del model
        free_memory()


def window_losses(model: Any, windows: torch.Tensor, batch: int) -> list[float]:
    """Return the mean nats per token of each window."""
    losses: list[float] = []
    for ids in torch.split(windows.to(model.device), batch):
        logits = model(input_ids=ids, use_cache=False).logits
        losses += score_logits(NegativeLogLikelihood(), logits, ids).tolist()
    return losses


# Results as numbers.


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700))


@dataclass(frozen=True)
class Row:
    """A row of the table: a label, its models (one per seed), and the seconds of the search."""

    label: str
    models: tuple[dict[str, Any], ...]
    seconds: float | None


def rows(bench: QualityBench, size: int) -> Iterator[tuple[str, Row]]:
    """Yield the measured rows for a size, by method."""
    for name in bench.options.methods:
        found = {seed: bench.removals(name, size, seed) for seed in METHODS[name].seeds}
        models = [bench.model(key_of(removals)) for removals in found.values() if removals]
        if models and all(map(is_measured, models)):
            yield name, Row(METHODS[name].label, tuple(models), bench.seconds(name, size))


def is_measured(model: dict[str, Any]) -> bool:
    return len(model["losses"]) == len(TEXTS)


def table(bench: QualityBench, size: int) -> str:
    """Return the Markdown table for one size."""
    dense, found = bench.model(DENSE), dict(rows(bench, size))
    reference = found[REFERENCE].models[0] if REFERENCE in found else None
    tasks = any(row.models[0]["tasks"] for row in found.values())
    header = ["method", *(f"{name} perplexity" for name in TEXTS)]
    header += [f"{name}, nats more than SLEB" for name in TEXTS] if reference else []
    header += [*TASKS.values(), "mean"] if tasks else []
    lines = []
    for name, row in {"": Row("dense", (dense,), None), **found}.items():
        cells = [row.label, *(spread([perplexity(m["losses"][text]) for m in row.models]) for text in TEXTS)]
        if reference:
            cells += [difference(name, row, reference, text) for text in TEXTS]
        if tasks:
            cells += accuracy_cells(row)
        lines.append([*cells, "" if row.seconds is None else f"{row.seconds:.0f}"])
    return markdown([*header, "seconds"], lines)


def spread(values: Sequence[float]) -> str:
    """Format a value, or the median and range of several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def difference(name: str, row: Row, reference: dict[str, Any], text: str) -> str:
    if name == REFERENCE:
        return ""
    if len(row.models) > 1:
        return f"{statistics.fmean(paired(m['losses'][text], reference['losses'][text])[0] for m in row.models):+.3f}"
    mean, error = paired(row.models[0]["losses"][text], reference["losses"][text])
    return f"{mean:+.3f} ± {error:.3f}"


def accuracy_cells(row: Row) -> list[str]:
    measured = [model["tasks"] for model in row.models if model["tasks"]]
    if not measured:
        return [""] * (len(TASKS) + 1)
    values = [statistics.fmean(tasks[task][0] for tasks in measured) for task in TASKS]
    errors = [statistics.fmean(tasks[task][1] for tasks in measured) for task in TASKS]
    mean_error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return [*(f"{value:.3f}" for value in values), f"{statistics.fmean(values):.3f} ± {mean_error:.3f}"]


def report(bench: QualityBench) -> str:
    """Return a table for each size, and how it was measured."""
    options, blocks = bench.options, bench.architecture.block_count
    decide = ("sizes", "samples", "length", "windows", "window_length", "items", "dtype", "fast")
    lines = [
        "Perplexity on windows of other encyclopaedia and of C4, drawn from all over the texts; differences in nats "
        "per token, paired over windows, with standard errors. Zero-shot accuracy with standard errors. Seconds are "
        "those of the search (one for the largest size where it serves the smaller ones).",
        "",
        *how_measured(options, "quality.py", decide),
    ]
    for size in options.sizes:
        if dict(rows(bench, size)):
            lines += ["", f"### {size} of {blocks} blocks removed", "", table(bench, size)]
    return "\n".join(lines)


def plot(bench: QualityBench, path: Path) -> None:
    """Draw perplexity against the number of removed blocks, by method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TEXTS), figsize=(12, 5), layout="constrained")
    curves: dict[str, dict[int, Row]] = {}
    for size in bench.options.sizes:
        for _, row in rows(bench, size):
            curves.setdefault(row.label, {})[size] = row
    for panel, text in zip(panels, TEXTS, strict=True):
        dense = perplexity(bench.model(DENSE)["losses"][text])
        for number, (label, points) in enumerate(curves.items()):
            middle = [statistics.median(perplexity(m["losses"][text]) for m in row.models) for row in points.values()]
            style = ["-", "--", ":"][number // 10]
            panel.plot([0, *points], [dense, *middle], style, marker=".", color=f"C{number % 10}", label=label)
        panel.set(title=text, xlabel="blocks removed", ylabel="perplexity", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)


def parse() -> argparse.Namespace:
    sizes = {"samples": 16, "batch": 4, "items": 300, "task_batch": 8}
    chosen = {"sizes": [3, 6, 9], "methods": list(METHODS), "task_methods": [], "fast": False, "plot": Path}
    found = parser(__doc__, work=Path("quality"), **sizes, **chosen)
    options = found.parse_args()
    require_known(found, "method", [*options.methods, *options.task_methods], [*METHODS, "all"])
    return options


def measure_all(bench: QualityBench) -> None:
    """Search and measure what is missing: first all models on the texts, then the chosen ones on the tasks."""
    options = bench.options
    for name in options.methods:
        sizes = options.sizes if METHODS[name].each_size else [max(options.sizes)]
        for seed, size in product(METHODS[name].seeds, sizes):
            if bench.removals(name, size, seed) is None:
                bench.search(name, seed, size)
    with_tasks = set(METHODS) if "all" in options.task_methods else set(options.task_methods)
    for tasks_too in (False, True):
        bench.measure((), with_tasks=tasks_too and bool(with_tasks))
        for size, name in product(options.sizes, options.methods):
            for seed in METHODS[name].seeds:
                removals = bench.removals(name, size, seed) or ()
                bench.measure(removals, with_tasks=tasks_too and name in with_tasks)


def main() -> None:
    bench = QualityBench(parse())
    run_saved(bench, measure_all, report)
    if bench.options.plot:
        plot(bench, bench.options.plot)


if __name__ == "__main__":
    main()
