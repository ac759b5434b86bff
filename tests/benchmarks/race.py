"""What `--fast` saves and what it costs: races replayed on the exact scores of a search, in many
orders.

    python tests/benchmarks/race.py MODEL TEXT [--samples 32] [--length 64] [--remove 4] [--orders
    40]

Each step is that of the exact search, so that errors do not add up. It prints the share of the
evaluations, how often the races kept the block that scores best on all sequences, and by how much
the score of another pick was worse.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import calibrated, parser

from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.race import Race
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.events import ignore
from sleb_plugins.metrics.nll import NegativeLogLikelihood

Scores = Mapping[int, Sequence[float]]
"""The exact scores of each candidate of a step, by sequence."""


def main() -> None:
    options = parser(
        __doc__, "model", "text", samples=32, length=64, remove=4, orders=40
    ).parse_args()
    model, blocks, calibration = calibrated(
        options.model, options.text, options.samples, options.length
    )
    with SkippableModel(model, blocks) as skippable:
        passes, reason = prepare_passes(skippable, calibration.sequences, ignore)
        assert reason is None, reason
        journal = Journal()
        scoring = Scoring(NegativeLogLikelihood(), passes, journal, None, ignore)
        problem = Problem(
            scoring.score, partial(Protection(1, 1).candidates, len(blocks)), options.remove
        )
        removals = [choice.block for choice in greedy(problem)]
    batches = range(len(passes.batches))
    steps = []
    for step, gone in enumerate(removals):
        candidates = problem.candidates(removals[:step])
        steps.append(
            {block: journal.scores(removals[:step], block, batches) for block in candidates}
        )
        print(f"step {step + 1}: block {gone}")
    print(report(steps, options.orders))


def report(steps: Sequence[Scores], orders: int) -> str:
    """Race in that many orders of the sequences; return what it saves and costs."""
    shares: list[list[float]] = [[] for _ in steps]
    costs = []
    for seed in range(orders):
        for step, (race, cost) in enumerate(replay(steps, random.Random(seed))):
            shares[step].append(race.evaluations / (len(race.candidates) * race.sequences))
            costs.append(cost)
    by_step = ", ".join(f"{fmean(share):.0%}" for share in shares)
    return (
        f"{fmean(map(fmean, shares)):.1%} of the evaluations ({by_step}), the exact block in "
        f"{costs.count(0)} of {len(costs)} steps, {fmean(costs):.5f} worse on average, "
        f"{max(costs):.4f} at most"
    )


def replay(steps: Sequence[Scores], rng: random.Random) -> list[tuple[Race, float]]:
    """Race through the steps of a search in a random order of sequences; return the races and what
    each pick costs.
    """
    sequences = len(next(iter(steps[0].values())))
    order = rng.sample(range(sequences), sequences)
    races: list[tuple[Race, float]] = []
    for scores in steps:
        race = Race(list(scores), sequences, races[-1][0] if races else None)
        for seen in range(1, sequences + 1):
            race.drop_beaten(
                {block: [scores[block][i] for i in order[:seen]] for block in race.contenders}
            )
        means = {block: fmean(scores[block]) for block in scores}
        best = race.outcome({block: means[block] for block in race.contenders}).best
        races.append((race, means[best] - min(means.values())))
    return races


if __name__ == "__main__":
    main()
