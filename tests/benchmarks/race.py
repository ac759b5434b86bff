"""How often a racing search finds the blocks of the exact one, what it saves, and what a different pick costs.

    python tests/benchmarks/race.py MODEL TEXT... [--samples 32] [--length 128] [--remove 4] [--orders 8] [--seed 0]

A TEXT is a file, or "self". Each text is searched exactly once; every step is then raced over the same scores, with the
sequences in `--orders` random orders. A search counts as equal if all of its steps are. The cost of another pick is the
difference between the losses of the two candidates over all sequences, in nats per token.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from saved_work import calibrated, greedy_search, parser

from sleb_cli.engine.forward.memory_budget import CPU_SETTINGS
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.race import LOOKS, Race
from sleb_cli.events import ignore

Matrix = dict[int, list[float]]


def main() -> None:
    found = parser(__doc__, samples=32, length=128, remove=4, orders=8, seed=0)
    found.add_argument("model")
    found.add_argument("texts", nargs="+")
    options = found.parse_args()

    print("| calibration | searches | equal | steps | equal | evaluations | another pick costs |")
    print("|---|---|---|---|---|---|---|")
    for text in options.texts:
        model, blocks, calibration = calibrated(options, text, "auto")
        sequences = calibration.sequences
        start = time.perf_counter()
        steps = exact_steps(SkippableModel(model, blocks), sequences, options.remove)
        seconds = time.perf_counter() - start
        fewest = CPU_SETTINGS.min_tokens_per_batch // options.length
        searches = [
            race(steps, random.Random(order).sample(range(len(sequences)), len(sequences)), fewest)
            for order in range(options.orders)
        ]
        raced = [step for search in searches for step in search]
        costs = [cost for _, cost in raced if cost]
        print(
            f"| {Path(text).name}, {len(sequences)} x {options.length}, seed {options.seed} "
            f"| {len(searches)} | {sum(not any(cost for _, cost in search) for search in searches)} "
            f"| {len(raced)} | {len(raced) - len(costs)} | {statistics.fmean(share for share, _ in raced):.0%} "
            f"| {', '.join(f'{cost:.4f}' for cost in costs) or '-'} |",
            flush=True,
        )
        print(f"exact: {[min(step, key=lambda b: sum(step[b])) for step in steps]}, {seconds:.0f} s", file=sys.stderr)


def exact_steps(model: SkippableModel, sequences: Any, remove: int) -> list[Matrix]:
    """Return the loss of each candidate on each sequence, for each step of the exact search."""
    journal, steps, removed = Journal(), [], ()
    with model as skippable:
        passes, _ = prepare_passes(skippable, sequences, ignore)
        batches = range(len(passes.batches))
        for choice in greedy_search(passes, remove, journal=journal):
            steps.append({block: journal.scores(removed, block, batches) for block in choice.outcome.scores})
            removed = choice.removals
    return steps


def race(steps: list[Matrix], order: list[int], fewest: int) -> list[tuple[float, float]]:
    """Race each step, with at least so many sequences in a batch.

    Return the share of evaluations that each step needed, and the cost of its pick over the best one.
    """
    found, before = [], {}
    size = max(1, len(order) // LOOKS, fewest)
    for matrix in steps:
        step = Race(list(matrix), len(order), before=before)
        for start in range(0, len(order), size):
            seen = order[: start + size]
            step.drop_beaten({block: [matrix[block][index] for index in seen] for block in step.contenders})
        before = {block: [matrix[block][index] for index in order[: step.scored(block)]] for block in matrix}
        losses = {block: statistics.fmean(scores) for block, scores in matrix.items()}
        cost = min(losses[block] for block in step.contenders) - min(losses.values())
        found.append((step.evaluations / (len(order) * len(matrix)), cost))
    return found


if __name__ == "__main__":
    main()
