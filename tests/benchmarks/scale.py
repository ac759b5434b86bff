"""What a large model costs: `sleb apply` against `cp -r`, and a search with `--stream` against the
same one in memory.

Each process is timed from its start until its output is on disk (`sync -f`), and both sides find
the model in the page cache if that is large enough. `all.py` runs both.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SLEB = (sys.executable, "-m", "sleb_cli")
WORDS = "river mountain snow water stone bridge town mill fish field winter road horse king".split()


# The model


def make_model(folder: Path, gib: float) -> None:
    """Write a random Llama of at least 4 blocks, without a tokenizer."""
    hidden, wide, vocabulary = 2048, 5504, 32000
    block = 4 * hidden**2 + 3 * hidden * wide
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 128,
        num_hidden_layers=max(4, round((gib * 2**29 - 2 * vocabulary * hidden) / block)),
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="1GB"
    )


# A run


@dataclass(frozen=True)
class Run:
    """What a process did; `marks` are the lines that it wrote to stderr, each with its second."""

    output: str
    marks: list[tuple[str, float]]
    seconds: float

    def at(self, begins: str) -> float:
        """Return the second of the first line that begins so."""
        return next(second for line, second in self.marks if line.startswith(begins))


def run(command: Sequence[object]) -> Run:
    """Run a process and watch it.

    Raises:
        SystemExit: it failed.
    """
    start, marks = time.perf_counter(), []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=subprocess.PIPE, text=True
        )
        for line in process.stderr:
            marks.append((line.strip(), time.perf_counter() - start))
        if process.wait():
            last = "\n".join(line for line, _ in marks[-8:])
            raise SystemExit(
                f"{' '.join(map(str, command))} ended with {process.returncode}:\n{last}"
            )
        seconds = time.perf_counter() - start
        output.seek(0)
        return Run(output.read(), marks, seconds)


# What is measured


def by_turns(rounds: int, sides: Sequence[str]) -> Iterator[str]:
    """Yield both sides in each round, and in every second one in reverse."""
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def ratio(seconds: dict[str, list[float]]) -> float:
    """Return how many times the median seconds of the first side the second takes."""
    first, second = map(statistics.median, seconds.values())
    return second / first


def copy(gib: float, place: Path) -> float:
    """Time `sleb apply` and `cp -r` of a random Llama by turns; return the ratio."""
    model, output = place / "llama", place / "copied"
    make_model(model, gib)
    apply = [*SLEB, "apply", model, "--blocks", "2,3", "-o", output, "--no-verify", "-q"]
    sides = {"cp -r": ["cp", "-r", model, output], "sleb apply": apply}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in by_turns(3, list(sides)):
        start = time.perf_counter()
        run(sides[name])
        subprocess.run(["sync", "-f", output], check=True)
        seconds[name].append(time.perf_counter() - start)
        shutil.rmtree(output)
        subprocess.run(["sync", "-f", place], check=True)  # the deletion is nobody's time
    return ratio(seconds)


def crossover(model: str, place: Path) -> float:
    """Time the search of a model that fits, in memory and streamed; require the same plan, return
    the ratio.
    """
    seconds: dict[str, list[float]] = {"--no-stream": [], "--stream": []}
    plans = []
    (place / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=100_000)))
    settings = [
        "--calibration",
        place / "text.txt",
        "--samples",
        4,
        "--sequence-length",
        256,
        "--remove",
        2,
        "--json",
    ]
    for flag in seconds:
        found = run(
            [
                *SLEB,
                "search",
                model,
                flag,
                *settings,
                "--sample-tokens",
                0,
                "-o",
                place / f"{flag}.json",
            ]
        )
        seconds[flag].append(found.at("step 2 of 2") - found.at("Search:"))
        plans.append({**json.loads(found.output), "environment": None})
    assert plans[0] == plans[1]
    return ratio(seconds)
