"""Quality of the pruned model by metric and strategy, on one model and calibration text, as a table.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll-greedy,last] [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl (perplexity), and
tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py (zero-shot accuracy). Plans are kept in WORK, and
each result in WORK/quality.json as soon as it is measured, by the blocks that the model lacks. Methods with the same
removals are measured once, and the same command resumes a stopped run.
With --items 0, no tasks run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from common import architecture_of, parser

from sleb_cli.__main__ import main as sleb
from sleb_cli.atomic import to_json, write_text
from sleb_cli.engine.device import CPU, free_memory
from sleb_cli.engine.door.evaluate import load_requested
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.surgery.loading import load_pruned, load_tokenizer, quiet_libraries
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.text.calibration import draw
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import adds_bos, cut_windows
from sleb_cli.events import ignore
from sleb_cli.plan import Plan, read_plan
from sleb_cli.requests import EvalRequest
from sleb_plugins.metrics.nll import NegativeLogLikelihood

TRAIN = "text/enwiki_train.txt"
TEXTS = {"enwiki": "text/enwiki_test.txt", "C4": "text/c4_50.jsonl"}
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


SETTING = ("samples", "length", "windows", "window_length", "items", "dtype")
"""The options with a value that decide the results; so does --fast."""


class QualityBench:
    """The model, the data and the options of the benchmark, and its results so far, in --work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.source, self.work = options, Path(options.data), Path(options.work)
        self.architecture = architecture_of(options.model)
        self.dtype = place_model(self.architecture, CPU, options.dtype, ignore, stream=False).dtype
        self.tokenizer = load_tokenizer(self.architecture.source)
        model = self.architecture.record.model_dump(mode="json", include={"model_type", "fingerprint", "blocks"})
        setting = {"model": model} | {name: getattr(options, name) for name in (*SETTING, "fast")}
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.work / "quality.json"
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {"setting": setting, "models": {}}
        if self.results["setting"] != setting:
            raise SystemExit(f"{self.file} is of {self.results['setting']}, not {setting}: use another --work.")

    def of(self, removed: Sequence[int]) -> dict[str, Any]:
        """Return the results of the model without these blocks, removed in any order."""
        found: dict[str, Any] = self.results["models"].setdefault(",".join(map(str, sorted(removed))), {})
        return found

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """Windows of each text, drawn at random positions, each beginning with BOS if the tokenizer's texts do."""
        found, bos = {}, adds_bos(self.tokenizer)
        for name, place in TEXTS.items():
            text = evaluation_text(str(self.source / place), self.options.window_length).content
            windows = cut_windows(self.tokenizer, text, self.options.window_length, bos=bos)
            found[name] = windows[draw(len(windows), self.options.windows, seed=0)]
        return found

    @cached_property
    def tasks(self) -> dict[str, LoadedTask]:
        folder = self.work / "tasks"
        subprocess.run([sys.executable, self.source / "make_tasks.py", folder], check=True)
        request = EvalRequest(tasks=tuple(TASKS), limit=self.options.items, include_path=folder, batch_size=8)
        return {task.name: task for task in load_requested(request)}

    def plan(self, name: str, seed: int, size: int, *, search: bool = False) -> Plan | None:
        """Return the plan of a method; if there is none yet, search for it through the command line, or return None."""
        options, method = self.options, METHODS[name]
        searched = size if method.each_size else max(options.sizes)
        file = self.work / f"{name}-{seed}-{searched}.json"
        if not (search or file.exists()):
            return None
        if not file.exists():
            given = ["--remove", searched, *method.options.format(seed=seed).split(), "--dtype", options.dtype]
            given += ["--samples", options.samples, "--sequence-length", options.length, "-o", file, "-q"]
            given += ["--fast"] if options.fast and name in RACING else []
            given += ["--resume"] if file.with_name(f"{file.name}.journal").exists() else []
            run_sleb("search", options.model, "--calibration", self.source / TRAIN, *given)
        return read_plan(file).first(size)

    def measure_model(self, removed: Sequence[int], wanted: Collection[str]) -> None:
        """Measure what is missing of these texts and tasks for the model without these blocks."""
        missing = [name for name in wanted if name not in self.of(removed)]
        if not missing:
            return
        say(f"without {removed}")
        surgery = plan_surgery(self.architecture, removed)
        model = load_pruned(surgery, self.dtype, CPU, ignore)
        with torch.inference_mode():
            for name in missing:
                if name in TEXTS:
                    result = window_losses(model, self.windows[name])
                    say(f"  {name} {perplexity(result):.2f}")
                else:
                    scores = self.tasks[name].run(model, self.tokenizer, name, ignore, ProcessGroup())["results"][name]
                    result = [scores["acc,none"], scores["acc_stderr,none"]]
                    say(f"  {TASKS[name]} {result[0]:.3f}")
                self.of(removed)[name] = result
                write_text(self.file, to_json(self.results))
        del model
        free_memory()

    def measure(self) -> None:
        """Search and measure what is missing: first all models on the texts, then on the tasks."""
        options = self.options
        removals = [
            self.plan(name, seed, size, search=True).removals
            for name in options.methods
            for seed, size in product(METHODS[name].seeds, options.sizes)
        ]
        for wanted in (TEXTS, TASKS) if options.items else (TEXTS,):
            for removed in ((), *removals):
                self.measure_model(removed, wanted)

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
        words = " ".join(f"--{name.replace('_', '-')} {getattr(self.options, name)}" for name in SETTING)
        yield f"`python tests/benchmarks/quality.py MODEL DATA {words}{' --fast' * self.options.fast}`"
        yield f"torch {torch.__version__}, transformers {transformers.__version__}, {processor_name(CPU)}."
        for size in self.options.sizes:
            if plans := self.measured(size):
                yield f"### {size} of {self.architecture.block_count} blocks removed"
                yield table(self, plans)


def window_losses(model: Any, windows: torch.Tensor) -> list[float]:
    """Return the mean nats per token of each window."""
    losses: list[float] = []
    for ids in torch.split(windows, 4):
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
    rows = [[*header, "seconds"], ["---"] * (len(header) + 1), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def spread(values: Sequence[float]) -> str:
    """Format a value, or the median and range of several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def difference(models: Sequence[dict[str, Any]], reference: dict[str, Any], text: str) -> str:
    differences = [[a - b for a, b in zip(model[text], reference[text], strict=True)] for model in models]
    mean = f"{statistics.fmean(map(statistics.fmean, differences)):+.3f}"
    only = differences[0]
    return mean if len(models) > 1 else f"{mean} ± {statistics.stdev(only) / math.sqrt(len(only)):.3f}"


def accuracies(models: Sequence[dict[str, Any]]) -> list[str]:
    measured = [model for model in models if TASKS.keys() <= model.keys()]
    if not measured:
        return [""] * (len(TASKS) + 1)
    values, errors = ([statistics.fmean(model[task][i] for model in measured) for task in TASKS] for i in (0, 1))
    mean_error = math.hypot(*errors) / len(errors)
    return [*(f"{value:.3f}" for value in values), f"{statistics.fmean(values):.3f} ± {mean_error:.3f}"]


def run_sleb(*command: object) -> None:
    """Run a `sleb` command in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = sleb([str(part) for part in command])
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise SystemExit(f"sleb {shlex.join(map(str, command))} ended with {code}")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    sizes = {"samples": 16, "length": 256, "windows": 24, "window_length": 512, "items": 300, "sizes": [3, 6, 9]}
    given = parser(
        __doc__, "model", "data", **sizes, dtype="bfloat16", methods=list(METHODS), fast=False, work="quality"
    )
    quiet_libraries()
    bench = QualityBench(given.parse_args())
    try:
        bench.measure()
    except KeyboardInterrupt:
        say("stopped: the same command resumes")
    say("\n\n".join(bench.report()))


if __name__ == "__main__":
    main()
