"""Quality of the pruned model by metric and strategy, on one model and calibration text, as tables.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll,cosine@oneshot] [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl (perplexity), and
tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py (zero-shot accuracy). Methods are entries of
`sleb search --compare`, which searches once for each; those that find the same blocks are measured once. What commands
print is kept in WORK, and the same command resumes a stopped run. With --items 0, no tasks run.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import parser

from sleb_cli.atomic import write_text
from sleb_cli.results import CompareResult, EvalResult, PrunedTextScores
from sleb_cli.tables.table import tabulate, to_markdown
from sleb_cli.units import spans

METHODS = {
    "nll": "greedy, nll (SLEB)", "nll@oneshot": "one-shot, nll", "kl": "greedy, kl", "cosine": "greedy, cosine",
    "cosine@oneshot": "one-shot, cosine (as ShortGPT)", "angular@contiguous": "contiguous, angular (as PruneMe)",
    "magnitude@oneshot": "one-shot, magnitude", "nll@refine": "refine, nll",
    **{f"random:{seed}@oneshot": f"random, seed {seed}" for seed in range(5)},
}  # fmt: skip
TEXTS = ("text/enwiki_test.txt", "text/c4_50.jsonl")
TASKS = "local_piqa,local_arc_easy,local_winogrande,local_socialiqa"


class QualityBench:
    """The commands, and what they print, in WORK."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.data, self.work = options, Path(options.data), Path(options.work)
        self.quality = ["--perplexity", ",".join(str(self.data / text) for text in TEXTS)]
        self.quality += ["--sequence-length", options.window_length, "--max-windows", options.windows]
        if options.items:
            subprocess.run([sys.executable, self.data / "make_tasks.py", self.work / "tasks"], check=True)
            self.quality += ["--tasks", TASKS, "--limit", options.items, "--include-path", self.work / "tasks"]

    def run(self, name: str, *command: object) -> str:
        """Return what a command of sleb prints, from WORK if it was run before."""
        file, words = self.work / f"{name}.json", [*map(str, command), "--dtype", self.options.dtype, "--json", "-q"]
        if not file.exists():
            print(f"sleb {shlex.join(words)}", file=sys.stderr)
            done = subprocess.run([sys.executable, "-m", "sleb_cli", *words], stdout=subprocess.PIPE, encoding="utf-8")
            if done.returncode:
                raise SystemExit(done.returncode)
            write_text(file, done.stdout)
        return file.read_text(encoding="utf-8")

    def compared(self, size: int) -> CompareResult:
        """Search by every method."""
        options, plan = self.options, self.work / f"{size}.plan.json"
        given = ["--samples", options.samples, "--sequence-length", options.length, "-o", plan, "--force"]
        given += ["--fast"] * options.fast + ["--resume"] * any(self.work.glob(f"{plan.name}.*.journal"))
        given += ["--calibration", self.data / "text/enwiki_train.txt", "--compare", ",".join(options.methods)]
        return CompareResult.model_validate_json(
            self.run(f"{size}.compared", "search", options.model, "--remove", size, *given)
        )

    def evaluated(self, removals: Sequence[int]) -> EvalResult:
        """Measure the model without these blocks, removed in any order."""
        blocks = ",".join(map(str, sorted(removals)))
        return EvalResult.model_validate_json(
            self.run(f"without {blocks}", "eval", self.options.model, "--blocks", blocks, *self.quality)
        )

    def rows(self, size: int) -> Iterator[list[str]]:
        """Yield the dense model and what each method finds: perplexities and scores of tasks."""
        compared = self.compared(size).compared
        for number, (method, search) in enumerate(zip(self.options.methods, compared, strict=True)):
            found = self.evaluated(search.removals)
            if number == 0:
                perplexities = [f"{text.dense.perplexity:.2f}" for text in found.texts]
                yield ["dense", "", *perplexities, *(f"{task.dense.value:.3f}" for task in found.tasks), ""]
            cells = [_perplexity(text.pruned[0]) for text in found.texts]
            cells += [f"{task.pruned[0].value:.3f} ({task.pruned[0].difference:+.3f})" for task in found.tasks]
            yield [METHODS.get(method, method), spans(search.removals), *cells, f"{search.seconds:.0f}"]

    def report(self, size: int) -> str:
        found = self.evaluated(self.compared(size).compared[0].removals)
        measured = [
            *(Path(text.text).stem for text in found.texts),
            *(f"{task.task}, {task.metric}" for task in found.tasks),
        ]
        columns = [(name, str) for name in ("method", "blocks", *measured, "seconds")]
        return "\n".join(
            [
                f"### {size} of {found.model.blocks} blocks removed",
                "",
                *to_markdown(tabulate("", columns, self.rows(size))),
            ]
        )


def _perplexity(scores: PrunedTextScores) -> str:
    error = "" if scores.standard_error is None else f" ± {scores.standard_error:.3f}"
    return f"{scores.perplexity:.2f} ({scores.log_ratio:+.3f}{error})"


def main() -> None:
    sizes = {"samples": 16, "length": 256, "windows": 24, "window_length": 512, "items": 300, "sizes": [3, 6, 9]}
    given = parser(
        __doc__, "model", "data", **sizes, dtype="bfloat16", methods=list(METHODS), fast=False, work="quality"
    )
    options = given.parse_args()
    Path(options.work).mkdir(parents=True, exist_ok=True)
    bench = QualityBench(options)
    for size in options.sizes:
        print(bench.report(size), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
