"""How well processes share a search: two of one thread each against one of two threads, in one run on one machine.

    python tests/benchmarks/processes.py MODEL TEXT [--samples 16] [--length 256] [--steps 2] [--rounds 3]

Efficiency is the time of a step in one process of two threads, over that in two processes of one thread. Both are the
least over the rounds, in which they take turns; starting and loading do not count. Bytes are those of the pickled
objects that a process sends.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from typing import Any

import torch
from arguments import parser
from saved_work import calibrated, greedy_search

from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup, join_processes
from sleb_cli.engine.search.journal import Journal
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
    sent, scores = two[0]["bytes"], two[0]["scores"]
    print(f"a process sends {', '.join(map(str, sent))} bytes a step, {sum(sent) * 2 / sum(scores):.1f} for each score")
    print(f"an exchange of {two[0]['payload']} bytes takes {1e3 * two[0]['exchange']:.2f} ms")


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
    measured: dict[str, list[Any]] = {"seconds": [], "bytes": [], "scores": [], "removals": []}
    with SkippableModel(model, blocks) as skippable:
        passes, reason = prepare_passes(skippable, calibration.sequences, ignore, memory=lambda device: 2 * 10**9)
        assert reason is None, reason
        next(greedy_search(passes, 1, group=group))  # warms up
        journal = Journal()
        group.gather(None)
        sizes: list[int] = []
        gather = group.gather
        setattr(group, "gather", lambda item: sizes.append(len(pickle.dumps(item))) or gather(item))  # noqa: B010
        start, sent, known = time.perf_counter(), 0, 0
        for choice in greedy_search(passes, options.steps, journal=journal, group=group):
            measured["seconds"].append(time.perf_counter() - start)
            measured["bytes"].append(sum(sizes) - sent)
            measured["scores"].append((len(journal) - known) * len(passes.batches[0]))
            measured["removals"].append(choice.block)
            start, sent, known = time.perf_counter(), sum(sizes), len(journal)
    payload = b"x" * (measured["bytes"][0] or 1)
    start = time.perf_counter()
    for _ in range(100):
        group.gather(payload)
    exchange = (time.perf_counter() - start) / 100
    if group.is_main:
        print(MARK + json.dumps(measured | {"exchange": exchange, "payload": len(payload)}), flush=True)


if __name__ == "__main__":
    main()
