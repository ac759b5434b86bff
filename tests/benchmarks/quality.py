"""Quality of the pruned model by metric and strategy, on one model and calibration text, as a table
and a figure.

    python tests/benchmarks/quality.py MODEL DATA [--sizes 3,6,9] [--methods nll,cosine@oneshot]
    [--items 300]

DATA is a folder with text/enwiki_train.txt (calibration), text/enwiki_test.txt and text/c4_50.jsonl
(perplexity), and tasks/{piqa,arc_easy,winogrande,socialiqa}.jsonl with make_tasks.py (zero-shot
accuracy). A method is METRIC or METRIC@STRATEGY. Plans and what was measured are kept in WORK, and
the same command resumes a stopped run. With --items 0, no tasks run. The table is printed, and the
figure is WORK/quality.svg.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common import parser

from sleb_cli.requests import journal_of

METHODS = """
nll nll@oneshot kl cosine cosine@oneshot
angular@contiguous magnitude@oneshot nll@refine random:{seed}@oneshot
""".split()
RACED = ("nll", "nll@refine", "kl")
"""The methods that `--fast` races."""
TEXTS = ("text/enwiki_test.txt", "text/c4_50.jsonl")
TASKS = "local_piqa,local_arc_easy,local_winogrande,local_socialiqa"


def sleb(*words: object) -> str:
    """Return what a command prints."""
    command = [sys.executable, "-m", "sleb_cli", *map(str, words)]
    print(f"sleb {shlex.join(command[3:])}", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def searched(options: argparse.Namespace, size: int, method: str) -> Path:
    """Search by a method, unless its plan is there, and return the plan."""
    metric, _, strategy = method.partition("@")
    plan: Path = options.work / f"{size}.{method.replace(':', '-')}.json"
    if not plan.exists():
        words = ["--metric", metric, "--strategy", strategy or "greedy", "--dtype", options.dtype]
        words += ["--samples", options.samples, "--sequence-length", options.length]
        words += ["--calibration", options.data / "text/enwiki_train.txt"]
        if options.fast and method in RACED:
            words.append("--fast")
        if journal_of(plan).exists():
            words.append("--resume")
        sleb("search", options.model, "--remove", size, *words, "-o", plan, "-q")
    return plan


def measures(options: argparse.Namespace) -> Iterator[object]:
    """Yield the options of `sleb eval`, which keeps what it measured beside each plan."""
    yield from (
        "--perplexity",
        ",".join(str(options.data / text) for text in TEXTS),
        "--dtype",
        options.dtype,
    )
    yield from (
        "--sequence-length",
        options.window_length,
        "--max-windows",
        options.windows,
        "-q",
        "--json",
    )
    if options.items:
        subprocess.run(
            [sys.executable, options.data / "make_tasks.py", options.work / "tasks"], check=True
        )
        yield from (
            "--tasks",
            TASKS,
            "--limit",
            options.items,
            "--include-path",
            options.work / "tasks",
        )


def main() -> None:
    sizes = {
        "samples": 16,
        "length": 256,
        "windows": 24,
        "window_length": 512,
        "items": 300,
        "sizes": [3, 6, 9],
    }
    options = parser(
        __doc__,
        "model",
        "data",
        **sizes,
        dtype="bfloat16",
        methods=METHODS,
        fast=False,
        work="quality",
    ).parse_args()
    options.work, options.data = Path(options.work), Path(options.data)
    options.work.mkdir(parents=True, exist_ok=True)
    plans = [
        searched(options, size, method) for size in options.sizes for method in options.methods
    ]
    given = [*measures(options)]
    for plan in plans:
        sleb("eval", plan, *given)
    sleb("export", *plans, "--to", "table", "-o", options.work / "quality.svg", "--force")
    print(sleb("export", *plans, "--to", "table"))


if __name__ == "__main__":
    main()
