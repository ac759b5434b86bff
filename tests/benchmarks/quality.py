"""Quality of the pruned model by metric and strategy, on one model and calibration text, as a table and a plot.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll-greedy,last] [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl (perplexity), and
tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py beside it (zero-shot accuracy). Each result is saved
to WORK/quality.json as soon as it is measured: searches by their settings, models by the blocks that they lack, so that
methods with the same removals are measured once, and the same command resumes a stopped run. --seconds sets a time
limit. --report writes the table into a Markdown file, between its two marks, and --plot draws the plot (needs the extra
`report`); both show the results so far.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import platform
import re
import shlex
import signal
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
import transformers
from saved_work import SavedWork

from sleb_cli.__main__ import main as sleb
from sleb_cli.atomic import write_text
from sleb_cli.engine.device import choose_dtype, free_memory
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.quality.tasks import load_requested
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, load_tokenizer, quiet_libraries
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.text.calibration import draw
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import cut_running_text
from sleb_cli.plan import read_plan
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import EvalRequest
from sleb_plugins.metrics.nll import NegativeLogLikelihood

TEXTS = {"enwiki": "text/enwiki_test.txt", "C4": "text/c4_50.jsonl"}
TASKS = {"local_piqa": "PIQA", "local_arc_easy": "ARC-e", "local_winogrande": "WinoG.", "local_socialiqa": "SIQA"}
MARKS = ("<!-- quality.py: begin -->", "<!-- quality.py: end -->")
DENSE, REFERENCE = "dense", "nll-greedy"


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


class Stopped(Exception):
    """The time limit is reached, or the user interrupted; all results are saved."""


class Work(SavedWork):
    """The results so far: searches, and what was measured of models."""

    def __init__(self, folder: Path, setting: dict[str, Any]) -> None:
        super().__init__(folder, "quality", setting, ("searches", "models"))

    def removals(self, name: str, size: int, seed: int) -> tuple[int, ...] | None:
        """Return the blocks that a method removes, if its search is done."""
        _, search = self._search(name, size, seed)
        return tuple(search["removals"][str(size)]) if search else None

    def seconds(self, name: str, size: int) -> float:
        """Return the mean seconds of a search over the seeds; one for a larger size serves the smaller ones."""
        searches = [self._search(name, size, seed) for seed in METHODS[name].seeds]
        return statistics.fmean(search["seconds"] for _, search in searches if search)

    def searched(self, name: str, size: int) -> str:
        """Return the size whose search found this size."""
        return self._search(name, size, seed=0)[0]

    def _search(self, name: str, size: int, seed: int) -> tuple[str, dict[str, Any]]:
        """Return the size whose search found this one, and the search; both empty if there is none."""
        searches = self.data["searches"].get(f"{name}/{seed}", {}).items()
        return next((found for found in searches if str(size) in found[1].get("removals", {})), ("", {}))

    def model(self, key: str) -> dict[str, Any]:
        return self.data["models"].setdefault(key, {"losses": {}, "tasks": {}})


def key_of(removals: Sequence[int], variant: str = "") -> str:
    """Return the name of a model by the blocks it lacks, in any order of removal."""
    return (",".join(map(str, sorted(removals))) or DENSE) + variant


class Bench:
    """The model, the data, and the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.architecture: Architecture = read_architecture(locate_model(options.model, quiet), load_plugins(), quiet)
        setting = {
            "model": self.architecture.record.model_dump(mode="json", include={"model_type", "fingerprint", "blocks"}),
            "calibration": [options.samples, options.length],
            "fast": options.fast,
            "windows": [options.windows, options.window_length],
            "items": options.items,
            "dtype": options.dtype,
        }
        self.work = Work(options.work, setting)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.architecture.source)

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """Windows of each text, drawn at random positions."""
        texts = {name: evaluation_text(str(self.options.data / place)) for name, place in TEXTS.items()}
        length, count = self.options.window_length, self.options.windows
        cut = {name: cut_running_text(self.tokenizer, text.content, length) for name, text in texts.items()}
        return {name: windows[draw(len(windows), count, seed=0)] for name, windows in cut.items()}

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
        found = self.work.data["searches"].setdefault(f"{name}/{seed}", {}).setdefault(str(size), {"seconds": 0.0})
        plan_file = self.work.folder / f"{name}-{seed}-{size}.json"
        command = [
            "search", self.options.model, "--remove", size, *METHODS[name].options.format(seed=seed).split(),
            "--calibration", self.options.data / "text/enwiki_train.txt", "--samples", self.options.samples,
            "--sequence-length", self.options.length, "--dtype", self.options.dtype, "-o", plan_file, "-q", "--json",
        ]  # fmt: skip
        command += ["--fast"] if self.options.fast and name in RACING else []
        command += ["--resume"] if plan_file.with_name(f"{plan_file.name}.journal").exists() else []
        say(f"search {name}, seed {seed}, {size} blocks")
        start = time.monotonic()
        if not plan_file.exists():
            run_sleb(command, on_exit=lambda: found.update(seconds=found["seconds"] + time.monotonic() - start))
        plan = read_plan(plan_file)
        sizes = [size] if METHODS[name].each_size else range(1, size + 1)
        found["removals"] = {str(count): list(plan.first(count).removals) for count in sizes}
        self.work.save()

    def perplexities(self, key: str, model: Any) -> None:
        losses = self.work.model(key)["losses"]
        for name, windows in self.windows.items():
            if name not in losses:
                losses[name] = window_losses(model, windows, self.options.batch)
                self.work.save()
        say("  " + ", ".join(f"{name} {math.exp(statistics.fmean(values)):.2f}" for name, values in losses.items()))

    def accuracies(self, key: str, model: Any) -> None:
        found = {}
        for task in self.tasks:
            name, scores = task.name, task.run(model, self.tokenizer, key, quiet)["results"][task.name]
            found[name] = [scores["acc,none"], scores["acc_stderr,none"]]
        self.work.model(key)["tasks"] = found
        self.work.save()
        say("  " + ", ".join(f"{TASKS[task]} {value:.3f}" for task, (value, _) in found.items()))

    def measure(self, key: str, removals: Sequence[int], *, with_tasks: bool, checkpoint: Path | None = None) -> None:
        """Measure what is missing for one model, pruned in memory or read from a checkpoint."""
        have = self.work.model(key)
        text_missing = any(name not in have["losses"] for name in TEXTS)
        tasks_missing = with_tasks and not have["tasks"]
        if not (text_missing or tasks_missing):
            return
        say(f"measure {key}")
        model = self._load(removals, checkpoint)
        with torch.inference_mode():
            if text_missing:
                self.perplexities(key, model)
            if tasks_missing:
                self.accuracies(key, model)
        del model
        free_memory()

    def _load(self, removals: Sequence[int], checkpoint: Path | None) -> Any:
        device = torch.device(self.options.device)
        dtype = choose_dtype(self.options.dtype, self.architecture.config.dtype, device)
        if checkpoint is not None:
            pruned = read_architecture(locate_model(str(checkpoint), quiet), load_plugins(), quiet)
            return load_dense(pruned, dtype, device, quiet)
        if removals:
            return load_pruned(plan_surgery(self.architecture, removals), dtype, device, quiet)
        return load_dense(self.architecture, dtype, device, quiet)

    def apply(self, key: str, name: str, size: int, options: str) -> Path:
        """Write a checkpoint with these options of `sleb apply`, such as --recover; return its folder."""
        folder = self.work.folder / "checkpoints" / re.sub(r"[^\w.+-]", "-", key)
        if not folder.exists():
            plan = self.work.folder / f"{name}-0-{self.work.searched(name, size)}.json"
            say(f"apply {key}")
            folder.parent.mkdir(exist_ok=True)
            start = time.monotonic()
            run_sleb(["apply", plan, "--remove", size, *shlex.split(options), "-o", folder, "-q", "--no-verify"])
            self.work.model(key)["seconds"] = time.monotonic() - start
            self.work.save()
        return folder


def window_losses(model: Any, windows: torch.Tensor, batch: int) -> list[float]:
    """Return the mean nats per token of each window."""
    losses: list[float] = []
    for ids in torch.split(windows.to(model.device), batch):
        logits = model(input_ids=ids, use_cache=False).logits
        losses += score_logits(NegativeLogLikelihood(), logits, ids).tolist()
    return losses


def run_sleb(command: Sequence[Any], on_exit: Any = lambda: None) -> None:
    """Run a `sleb` command in this process."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = sleb([str(part) for part in command])
    finally:
        on_exit()
    if code in (130, 143):
        raise Stopped
    if code:
        raise SystemExit(f"sleb {shlex.join(map(str, command))} ended with {code}")


def quiet(event: object) -> None:
    """Drop progress events."""


def say(text: str) -> None:
    print(text, flush=True)


# Results as numbers.


def paired(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of two models in nats per token over the same windows, and its standard error."""
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700))


@dataclass(frozen=True)
class Row:
    """A row of the table: a label, its models (one per seed), and the seconds of the search."""

    label: str
    models: tuple[dict[str, Any], ...]
    seconds: float | None


def rows(bench: Bench, size: int) -> Iterator[tuple[str, Row]]:
    """Yield the measured rows for a size, by method."""
    for name in bench.options.methods:
        found = {seed: bench.work.removals(name, size, seed) for seed in METHODS[name].seeds}
        models = [bench.work.model(key_of(removals)) for removals in found.values() if removals]
        if models and all(map(is_measured, models)):
            yield name, Row(METHODS[name].label, tuple(models), bench.work.seconds(name, size))
        for variant in bench.options.variants if name in bench.options.variant_methods else ():
            after = bench.work.model(key_of(found.get(0) or (), variant))
            if is_measured(after):
                back = "/".join(f"{share:.0%}" for share in shares_back(bench.work.model(DENSE), models[0], after))
                label = f"{METHODS[name].label} {variant} ({back} of the lost nats back)"
                yield name + variant, Row(label, (after,), after.get("seconds"))


def shares_back(dense: dict[str, Any], pruned: dict[str, Any], after: dict[str, Any]) -> list[float]:
    """Return, for each text, the share of the nats lost by the removal that a recovery won back."""
    means = [[statistics.fmean(model["losses"][text]) for model in (dense, pruned, after)] for text in TEXTS]
    return [(lost - now) / (lost - whole) for whole, lost, now in means]


def is_measured(model: dict[str, Any]) -> bool:
    return len(model["losses"]) == len(TEXTS)


def table(bench: Bench, size: int) -> str:
    """Return the Markdown table for one size."""
    dense = bench.work.model(DENSE)
    found = dict(rows(bench, size))
    reference = found[REFERENCE].models[0] if REFERENCE in found else None
    tasks = any(row.models[0]["tasks"] for row in found.values())
    against = [f"{name}, nats more than SLEB" for name in TEXTS] if reference else []
    header = ["method", *(f"{name} perplexity" for name in TEXTS), *against]
    header += [*TASKS.values(), "mean"] if tasks else []
    header += ["seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in {"": Row("dense", (dense,), None), **found}.items():
        cells = [row.label, *(spread([perplexity(m["losses"][text]) for m in row.models]) for text in TEXTS)]
        if reference:
            cells += [difference(name, row, reference, text) for text in TEXTS]
        if tasks:
            cells += accuracy_cells(row)
        cells.append("" if row.seconds is None else f"{row.seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def report(bench: Bench) -> str:
    """Return the text between the marks of the document."""
    options, blocks = bench.options, bench.architecture.block_count
    raced = ", nll and kl raced (`--fast`)" if options.fast else ""
    with_tasks = any(model["tasks"] for model in bench.work.data["models"].values())
    items = f" Zero-shot accuracy on the first {options.items} items, with standard errors." if with_tasks else ""
    lines = [
        f"{Path(options.model).name}, {blocks} blocks, {options.dtype}; calibrated on {options.samples} x "
        f"{options.length} tokens of encyclopaedia{raced}. Perplexity on {options.windows} windows of "
        f"{options.window_length} tokens, of other "
        f"encyclopaedia and of C4, drawn from all over the texts; differences in nats per token, paired over windows, "
        f"with standard errors.{items} Seconds are those of the search (one for the largest size where it serves the "
        f"smaller ones) or of the recovery.",
        "",
        f"`python tests/benchmarks/quality.py {as_typed(options)}`",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, {processor_name(torch.device(options.device))}.",
    ]
    for size in options.sizes:
        if dict(rows(bench, size)):
            lines += ["", f"### {size} of {blocks} blocks removed", "", table(bench, size)]
    return "\n".join(lines)


def as_typed(options: argparse.Namespace) -> str:
    """Return the arguments that affect a number, without paths of this machine."""
    decide = ("sizes", "samples", "length", "windows", "window_length", "items", "dtype")
    given = {name: getattr(options, name) for name in decide}
    text = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in text.items()]
    return " ".join([Path(options.model).name, "DATA", *words, *(["--fast"] if options.fast else [])])


def write_report(text: str, path: Path) -> None:
    """Replace the text between the marks of a document; keep the rest."""
    document = path.read_text() if path.exists() else f"# Quality\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, _, rest = document.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_text(path, f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def plot(bench: Bench, path: Path) -> None:
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
        dense = perplexity(bench.work.model(DENSE)["losses"][text])
        for number, (label, points) in enumerate(curves.items()):
            middle = [statistics.median(perplexity(m["losses"][text]) for m in row.models) for row in points.values()]
            style = ["-", "--", ":"][number // 10]
            panel.plot([0, *points], [dense, *middle], style, marker=".", color=f"C{number % 10}", label=label)
        panel.set(title=text, xlabel="blocks removed", ylabel="perplexity", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quality"), help="folder for results")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in names(text)], default=[3, 6, 9])
    parser.add_argument("--methods", type=names, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens in each")
    parser.add_argument("--fast", action="store_true", help="stop scoring a candidate once it is clearly behind")
    parser.add_argument("--windows", type=int, default=24, help="windows of each text")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows per batch")
    parser.add_argument("--items", type=int, default=300, help="items of each task")
    parser.add_argument("--task-methods", type=names, default=[], help="methods also measured on tasks, or all")
    parser.add_argument("--task-batch", type=int, default=8)
    parser.add_argument("--variants", type=names, default=[], help="options of apply: --variants=--recover,--heal")
    parser.add_argument("--variant-methods", type=names, default=[REFERENCE], help="methods that the variants apply to")
    parser.add_argument("--variant-options", default="", help="further options of apply, in one string")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=int, help="time limit; the same command resumes")
    parser.add_argument("--show", action="store_true", help="measure nothing, show the results so far")
    parser.add_argument("--report", type=Path, help="Markdown file to write the table into")
    parser.add_argument("--plot", type=Path, help="file to draw the plot into: .svg, .png")
    options = parser.parse_args()
    for name in [*options.methods, *options.task_methods, *options.variant_methods]:
        if name not in (*METHODS, "all"):
            parser.error(f"there is no method {name}: {', '.join(METHODS)}")
    return options


def search_all(bench: Bench) -> None:
    """Run the searches that are missing."""
    options = bench.options
    for name in options.methods:
        sizes = options.sizes if METHODS[name].each_size else [max(options.sizes)]
        for seed, size in product(METHODS[name].seeds, sizes):
            if bench.work.removals(name, size, seed) is None:
                bench.search(name, seed, size)


def measure_all(bench: Bench) -> None:
    """Measure what is missing: first all models on the texts, then the chosen ones on the tasks."""
    options = bench.options
    with_tasks = set(METHODS) if "all" in options.task_methods else set(options.task_methods)
    for tasks_too in (False, True):
        bench.measure(DENSE, (), with_tasks=tasks_too and bool(with_tasks))
        for size, name in product(options.sizes, options.methods):
            for seed in METHODS[name].seeds:
                removals = bench.work.removals(name, size, seed) or ()
                bench.measure(key_of(removals), removals, with_tasks=tasks_too and name in with_tasks)
    for size, name, variant in product(options.sizes, options.variant_methods, options.variants):
        removals = bench.work.removals(name, size, 0) or ()
        key = key_of(removals, variant)
        folder = bench.apply(key, name, size, f"{variant} {options.variant_options}")
        bench.measure(key, removals, with_tasks=name in with_tasks, checkpoint=folder)


def main() -> None:
    options = parse()
    quiet_libraries()
    bench = Bench(options)
    if options.seconds:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(options.seconds)
    try:
        if not options.show:
            search_all(bench)
            measure_all(bench)
    except (Stopped, KeyboardInterrupt):
        say("stopped: the same command resumes")
    finally:
        signal.alarm(0)
        bench.work.save()
    text = report(bench)
    say(text)
    if options.report:
        write_report(text, options.report)
    if options.plot:
        plot(bench, options.plot)


if __name__ == "__main__":
    main()
