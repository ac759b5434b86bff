"""When pruning pays: what each kind of use keeps, and what is gained, by size, recovery and
quantization.

    python tests/benchmarks/when_it_pays.py MODEL WORK [--sizes 2,4,6] [--recovered 2,4] [--healed
    4] [--minutes 60]
        [--calibration code.jsonl] [--texts code_test.jsonl,wikitext2] [--tasks
        sleb,humaneval_instruct] [--limit 300] [--quantized Q3_K_M.gguf,Q2_K.gguf] [--chat]

It runs sleb's commands in WORK, prints each, and skips what WORK holds, so the same command
resumes. Then it prints the rows of docs/when-it-pays.md, and draws WORK/when-it-pays.svg. If MODEL
is a GGUF file, llama.cpp is timed, else transformers; --quantized are GGUF files of the dense model
in fewer bits.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import parser
from draw_when_it_pays import Mark, draw

from sleb_cli.engine.statistics import paired_difference
from sleb_cli.order import SizeKey
from sleb_cli.results import BenchResult, EvalResult, PrunedTaskScores, TaskResult
from sleb_cli.tables.quality import Estimate, by_use, retention, text_names
from sleb_cli.tables.table import Table, tabulate, to_markdown
from sleb_cli.units import format_bytes, format_perplexity

ALONE: SizeKey = (-1,)
"""Stands for the blocks of a model that was measured without the dense one."""


@dataclass(frozen=True)
class Row:
    """A model: bytes of its weights, tokens a second by workload, perplexities, and what each kind
    of use keeps.
    """

    name: str
    bytes: int
    speeds: dict[str, float]
    perplexities: dict[str, float] = field(default_factory=dict)
    uses: dict[str, Estimate] = field(default_factory=dict)


class Bench:
    """The commands, and what they write into WORK."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.engine = ["--engine", "llama.cpp"] if options.model.endswith(".gguf") else []
        quality = {
            "--perplexity": ",".join(options.texts), "--sequence-length": 512, "--max-windows": 16,
            "--tasks": options.tasks, "--limit": options.limit,
        }  # fmt: skip
        self.quality = [word for pair in quality.items() if pair[1] for word in pair]
        self.quality += [
            "--run-code",
            "confined",
            *(["--apply-chat-template"] if options.chat else []),
        ]

    def run(self, output: str, *command: object) -> Path:
        """Run a command of sleb, unless its output is there."""
        file, words = self.work / output, [*map(str, command)]
        if not file.exists():
            print(f"sleb {shlex.join(words)} -o {file}", flush=True)
            if code := subprocess.run(
                [sys.executable, "-m", "sleb_cli", *words, "-o", file, "-q"]
            ).returncode:
                raise SystemExit(code)
        return file

    def evaluated(self, name: str, *command: object) -> EvalResult:
        file = self.run(f"{name}.eval.json", "eval", *command, *self.quality)
        return EvalResult.model_validate_json(file.read_text())

    def timed(self, name: str, *command: object) -> BenchResult:
        given = [
            "--prompt-length",
            512,
            "--new-tokens",
            32,
            "--sweep",
            "batch=1,8",
            "--iterations",
            3,
        ]
        file = self.run(f"{name}.bench.json", "bench", *command, *self.engine, *given)
        return BenchResult.model_validate_json(file.read_text())

    def rows(self) -> Iterator[Row]:
        """Yield the dense model, each size pruned, recovered and healed, and the dense model in
        fewer bits.
        """
        options, model = self.options, self.options.model
        text = ["--calibration", options.calibration] if options.calibration else []
        plan = self.run(
            "plan.json", "search", model, "--remove", max(options.sizes), "--fast", *text
        )
        sizes = ["--remove", ",".join(map(str, options.sizes))]
        dense = self.evaluated("sizes", plan, *sizes)
        times = self.timed("sizes", plan, *sizes, *(["--source", model] if self.engine else []))
        blocks = dense.model.blocks
        for removals in ((), *dense.sizes):
            yield row(f"{blocks - len(removals)} of {blocks} blocks", times, removals, dense, dense)
        heal = ["--heal", "--heal-minutes", options.minutes]
        for how, more in {"recovered": [], "healed": heal}.items():
            for size in getattr(options, how):
                name, removals = (
                    f"{blocks - size}-{how}",
                    next(each for each in dense.sizes if len(each) == size),
                )
                folder = self.run(name, "apply", plan, "--remove", size, "--recover", *more)
                found = self.evaluated(name, folder)
                yield row(
                    f"{blocks - size} of {blocks} blocks, {how}",
                    times,
                    removals,
                    beside(dense, found),
                    found,
                )
        for file in map(Path, filter(None, options.quantized)):
            found, times = self.evaluated(file.stem, file), self.timed(file.stem, file)
            yield row(file.stem, times, (), beside(dense, found), found)


def row(
    name: str, times: BenchResult, removals: SizeKey, paired: EvalResult, found: EvalResult
) -> Row:
    """Return the row of a model: its uses from what is `paired` with the dense model, its
    perplexities as `found`.
    """
    size = next(each for each in (times.dense, *times.pruned) if each.removals == removals)
    which = removals if paired is found else ALONE
    uses = {
        use: share
        for use, tasks in by_use(paired.tasks).items()
        if (share := retention(tasks, which))
    }
    speeds = {
        result.workload.label: timing.tokens_per_second
        for result in times.workloads
        for timing in (result.dense, *result.pruned)
        if getattr(timing, "removals", ()) == removals
    }
    scores = [(text.dense, *text.pruned) for text in found.texts]
    own = [
        next(s for s in each if which is ALONE or getattr(s, "removals", ()) == removals)
        for each in scores
    ]
    perplexities = {
        name: each.perplexity for name, each in zip(text_names(found.texts), own, strict=True)
    }
    return Row(
        name, size.weights_bytes, speeds, perplexities, uses if removals or which is ALONE else {}
    )


def beside(dense: EvalResult, found: EvalResult) -> EvalResult:
    """Return the tasks of a dense model with the scores of another one, as if it were a pruned one:
    `ALONE`.
    """
    others = {task.key: task for task in found.tasks}
    pairs = [
        (task, others[task.key]) for task in dense.tasks if task.key in others and task.dense.items
    ]
    return dense.model_copy(update={"tasks": tuple(compared(*pair) for pair in pairs)})


def compared(dense: TaskResult, other: TaskResult) -> TaskResult:
    found = paired_difference(dense.dense.items, other.dense.items)
    entry = PrunedTaskScores.model_construct(
        removals=ALONE, difference=found.mean, difference_interval=found.interval
    )
    return dense.model_copy(update={"pruned": (entry,)})


def table(rows: Iterable[Row]) -> Table:
    """Return what docs/when-it-pays.md shows: the share of the dense model's score that is kept,
    with its interval.
    """
    forms = {
        "speeds": "{:.1f}".format,
        "perplexities": format_perplexity,
        "uses": kept_with_interval,
    }
    rows, columns = list(rows), [("model", str), ("size", format_bytes)]
    cells = [[each.name, each.bytes] for each in rows]
    for kind, form in forms.items():
        for name in dict.fromkeys(name for each in rows for name in getattr(each, kind)):
            columns.append((f"perplexity of {name}" if kind == "perplexities" else name, form))
            for line, each in zip(cells, rows, strict=True):
                line.append(getattr(each, kind).get(name))
    return tabulate("When it pays", columns, cells)


def kept_with_interval(found: Estimate) -> str:
    share, ends = found
    return f"{share:.0%}" + (f" ({ends.low:.0%} to {ends.high:.0%})" if ends else "")


def marks_of(rows: list[Row]) -> Iterator[Mark]:
    dense = rows[0]
    prompt = next(name for name in dense.speeds if name.startswith("prompt"))
    for each in (dense, *(row for row in rows if row.uses)):
        size, _, recovery = each.name.partition(", ")
        label, _, blocks = size.partition(" of ")
        recipe = (
            "all blocks"
            if each is dense
            else recovery or ("blocks removed" if blocks else "fewer bits")
        )
        yield Mark(
            label, recipe, each.bytes / 1e9, each.speeds[prompt] / dense.speeds[prompt], each.uses
        )


def main() -> None:
    lists = {
        "sizes": [2, 4, 6],
        "recovered": [4],
        "healed": [4],
        "texts": ["wikitext2"],
        "quantized": [""],
    }
    others = {"limit": 300, "minutes": 60, "tasks": "sleb", "calibration": ""}
    options = parser(__doc__, "model", "work", **lists, **others, chat=False).parse_args()
    rows = list(Bench(options).rows())
    print("\n".join(to_markdown(table(rows))))
    (Path(options.work) / "when-it-pays.svg").write_text(
        draw(list(marks_of(rows))), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
