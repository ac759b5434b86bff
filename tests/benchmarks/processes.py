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
from functools import partial
from typing import Any

import torch

from sleb_cli.engine.device import choose_dtype
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.process_group import ProcessGroup, join_processes
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer, quiet_libraries
from sleb_cli.engine.text.calibration import calibrate, resolve_calibration
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import CalibrationRequest
from sleb_plugins.metrics.nll import NegativeLogLikelihood

MARK = "measured: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with join_processes() as group:
            work(options, group)
        return
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes, of_count in found.items():
            of_count.append(run(processes, threads=2 // processes))
    one, two = found[1], found[2]
    for processes, of_count in found.items():
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
    quiet_libraries()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cpu")
    architecture = read_architecture(locate_model(options.model, ignore), load_plugins(), ignore)
    tokenizer = load_tokenizer(architecture.source)
    model = load_dense(architecture, choose_dtype(options.dtype, architecture.config.dtype, device), device, ignore)
    request = CalibrationRequest(calibration=options.text, samples=options.samples, sequence_length=options.length)
    sequences = calibrate(resolve_calibration(request, architecture), tokenizer, lambda: model, ignore).sequences
    blocks = architecture.blocks_of(model)
    measured: dict[str, list[Any]] = {"seconds": [], "bytes": [], "scores": [], "removals": []}
    with SkippableModel(model, blocks) as skippable:
        passes, reason = prepare_passes(skippable, sequences, ignore, memory=lambda device: 2 * 10**9)
        assert reason is None, reason
        scoring = Scoring(NegativeLogLikelihood(), passes, Journal(), None, ignore, group=group)
        scoring.losses(())  # warms up
        group.gather(None)
        sizes: list[int] = []
        gather = group.gather
        setattr(group, "gather", lambda item: sizes.append(len(pickle.dumps(item))) or gather(item))  # noqa: B010
        start, sent, known = time.perf_counter(), 0, len(scoring.journal)
        candidates = partial(Protection(1, 1).candidates, len(blocks))
        for choice in greedy(Problem(scoring.score, candidates, options.steps)):
            measured["seconds"].append(time.perf_counter() - start)
            measured["bytes"].append(sum(sizes) - sent)
            measured["scores"].append((len(scoring.journal) - known) * len(passes.batches[0]))
            measured["removals"].append(choice.block)
            start, sent, known = time.perf_counter(), sum(sizes), len(scoring.journal)
    payload = b"x" * (measured["bytes"][0] or 1)
    start = time.perf_counter()
    for _ in range(100):
        group.gather(payload)
    exchange = (time.perf_counter() - start) / 100
    if group.is_main:
        print(MARK + json.dumps(measured | {"exchange": exchange, "payload": len(payload)}), flush=True)


if __name__ == "__main__":
    main()
