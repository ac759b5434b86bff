"""How well processes share a search: two of one thread each against one of two threads, in one run on one machine.

    python tests/benchmarks/processes.py MODEL TEXT [--samples 16] [--length 256] [--steps 2] [--rounds 3]

Efficiency is the time of a step in one process of two threads, over that in two processes of one thread. Both are the
least over the rounds, in which they take turns; starting and loading do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from saved_work import calibrated, greedy_search, parser

from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup, join_processes
from sleb_cli.events import ignore

MARK = "measured: "


def main() -> None:
    found = parser(__doc__, "model", "text", samples=16, length=256, steps=2, rounds=3, seed=0, dtype="bfloat16")
    found.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = found.parse_args()
    if options.worker:
        with join_processes() as group:
            work(options, group)
        return
    by_count: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes, of_count in by_count.items():
            of_count.append(run(processes, threads=2 // processes))
    one, two = by_count.values()
    for processes, of_count in by_count.items():
        least = ", ".join(f"{seconds:.2f}" for seconds in best(of_count))
        print(f"{processes} x {2 // processes} threads: {least} s a step; removed {of_count[0]['removals']}")
    steps = list(zip(best(one), best(two), strict=True))
    print(f"efficiency: {sum(a for a, _ in steps) / sum(b for _, b in steps):.3f} (at each step ", end="")
    print(", ".join(f"{a / b:.3f}" for a, b in steps) + ")")


def run(processes: int, threads: int) -> dict[str, Any]:
    """Run this file as so many processes, and return what the main one measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        sys.exit(done.stderr)
    measured: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    return measured


def best(rounds: list[dict[str, Any]]) -> list[float]:
    """Return the least time of each step."""
    return [min(times) for times in zip(*(each["seconds"] for each in rounds), strict=True)]


def work(options: argparse.Namespace, group: ProcessGroup) -> None:
    """Search for a few steps, and print what the main process measures."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, blocks, calibration = calibrated(options, options.text, options.dtype)
    seconds, removals = [], []
    with SkippableModel(model, blocks) as skippable:
        passes, reason = prepare_passes(skippable, calibration.sequences, ignore, memory=lambda device: 2 * 10**9)
        assert reason is None, reason
        next(greedy_search(passes, 1, group=group))  # warms up
        group.gather(None)
        start = time.perf_counter()
        for choice in greedy_search(passes, options.steps, group=group):
            seconds.append(time.perf_counter() - start)
            removals.append(choice.block)
            start = time.perf_counter()
    if group.is_main:
        print(MARK + json.dumps({"seconds": seconds, "removals": removals}), flush=True)


if __name__ == "__main__":
    main()
