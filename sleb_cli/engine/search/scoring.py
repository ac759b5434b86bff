"""Score the removal of each candidate block, for each of the four kinds of metric.

Only scores that the journal lacks are measured. Processes share that work, and exchange
measurements after each turn, so they decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.passes import Job, Passes
from sleb_cli.engine.search.choices import Outcome, ranking
from sleb_cli.engine.search.journal import Journal, Measurement, Name
from sleb_cli.engine.search.race import Race, rounds
from sleb_cli.engine.search.shares import Cost, deal_names
from sleb_cli.events import SCORING_TASK, Advance, Notice, Notify, no_progress, task
from sleb_cli.plan import Method
from sleb_plugins import HiddenStateMetric, LogitMetric, Metric, ModelMetric, WeightMetric
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def engine_of(metric: Metric, passes: Passes) -> Method:
    """Name the way in which candidates are scored by this metric."""
    if isinstance(metric, WeightMetric):
        return "weights"
    return "model" if isinstance(metric, ModelMetric) else "fork" if passes.forks else "plain"


@dataclass(frozen=True)
class Scoring:
    """Scores candidates and measures losses by passes over the calibration sequences, and keeps
    them in the journal.

    Attributes:
        fast: whether candidates race.
        held_out: passes over sequences that the search never scores.
        require_sound: raises an error if the dense model itself computes numbers that are not
            finite.
    """

    metric: Metric
    passes: Passes
    journal: Journal
    tokenizer: Any
    notify: Notify
    fast: bool = False
    held_out: Passes | None = None
    require_sound: Callable[[], None] = lambda: None
    _weight_scores: dict[int, float] = field(default_factory=dict, init=False)
    _races: dict[tuple[int, ...], Race] = field(default_factory=dict, init=False)
    """The races so far, by the blocks that were removed before."""

    @property
    def sequences(self) -> int:
        """The number of calibration sequences."""
        return sum(len(batch) for batch in self.passes.batches)

    def losses(
        self, removed: Sequence[int], *, held_out: bool = False, advance: Advance = no_progress
    ) -> list[float]:
        """Return the negative log-likelihood of each sequence without these blocks, in nats per
        token.
        """
        removed = tuple(removed)
        # The scores of the last removed block by `nll` are these losses.
        if removed and self.metric.name == "nll" and not held_out:
            scores = self.journal.scores(removed[:-1], removed[-1], self._batches)
            if len(scores) == self.sequences:
                return scores
        passes = self.held_out if held_out else self.passes
        assert passes is not None
        self._score_tokens(passes, NegativeLogLikelihood(), removed, (), passes.numbers, advance)
        return self.journal.scores(removed, None, passes.numbers)

    def _shares(
        self,
        wanted: Iterable[Name],
        advance: Advance,
        cost: Cost | None = None,
        *,
        count_own: bool = True,
    ) -> Iterator[list[Name]]:
        """Yield this process's share of each turn of the missing measurements, and exchange scores
        after it.

        The bar advances by recorded measurements, then by new ones; by this process's own only if
        `count_own`.
        """
        known, group = {name: self.journal.find(*name) for name in wanted}, self.journal.group
        advance(sum(self._evaluations((name, scores)) for name, scores in known.items() if scores))
        missing = {name: None for name, scores in known.items() if not scores}
        shares = [turn[group.rank] for turn in deal_names(missing, group.size, cost)]
        if (
            shares and not self.passes.skippable.weights.resident
        ):  # a single turn reads streamed weights once
            shares = [[name for share in shares for name in share]]
        for share in shares:
            yield share
            for rank, measured in enumerate(self.journal.exchange()):
                if count_own or rank != group.rank:
                    advance(sum(self._evaluations(item) for item in measured if item[0] in missing))

    def _evaluations(self, measurement: Measurement) -> int:
        (_, _, batch), scores = measurement
        return self.sequences if batch is None else len(scores)

    @property
    def _batches(self) -> Sequence[int | None]:
        return [None] if isinstance(self.metric, ModelMetric) else self.passes.numbers

    def _mean_scores(self, removed: Sequence[int], blocks: Sequence[int]) -> dict[int, float]:
        scores_of = {block: self.journal.scores(removed, block, self._batches) for block in blocks}
        return {block: fmean(scores) for block, scores in scores_of.items() if scores}

    def score(self, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score each candidate after these removals; of a race, return the survivors' scores.

        Raises:
            ModelError: the dense model computes numbers that are not finite.
        """
        removed, metric = tuple(removed), self.metric
        with task(
            self.notify, SCORING_TASK, len(candidates) * self.sequences, "evaluations"
        ) as advance:
            if isinstance(metric, LogitMetric):
                outcome = self._score_logits(metric, removed, candidates, advance)
            elif isinstance(metric, HiddenStateMetric):
                outcome = self._score_states(
                    metric, removed, [(block,) for block in candidates], 1, advance
                )
            elif isinstance(metric, WeightMetric):
                outcome = Outcome(self._score_weights(metric, candidates, advance))
            else:
                assert isinstance(metric, ModelMetric)
                outcome = self._score_models(metric, removed, candidates, advance)
        return self._rank_nonfinite_last(outcome, removed)

    def score_spans(self, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Score the model without each span of blocks, which will have up to `longest`."""
        metric = self.metric
        if not isinstance(metric, HiddenStateMetric | WeightMetric):
            return Outcome(
                {span[-1]: self.score(span[:-1], span[-1:]).scores[span[-1]] for span in spans}
            )
        with task(self.notify, SCORING_TASK, len(spans) * self.sequences, "evaluations") as advance:
            if isinstance(metric, HiddenStateMetric):
                outcome = self._score_states(metric, (), spans, longest, advance)
            else:
                if new := sorted(
                    {block for span in spans for block in span} - self._weight_scores.keys()
                ):
                    self._weight_scores.update(
                        Outcome(self._score_weights(metric, new, advance)).scores
                    )
                # A span's weights score as much as its blocks together.
                outcome = Outcome(
                    {span[-1]: math.fsum(self._weight_scores[b] for b in span) for span in spans}
                )
        return self._rank_nonfinite_last(outcome, ())

    def _rank_nonfinite_last(self, outcome: Outcome, removed: Sequence[int]) -> Outcome:
        if worst := [block for block, score in outcome.scores.items() if score == math.inf]:
            self.require_sound()
            after = f" (with {', '.join(map(str, removed))} removed)" if removed else ""
            which = (
                f"block {worst[0]}"
                if len(worst) == 1
                else f"any of the blocks {', '.join(map(str, worst))}"
            )
            self.notify(
                Notice(f"Without {which}{after}, scores are NaN or infinite, so they rank last.")
            )
        return outcome

    @torch.inference_mode()
    def _score_logits(
        self,
        metric: LogitMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        advance: Advance,
    ) -> Outcome:
        if not self.fast:
            self._score_tokens(self.passes, metric, removed, candidates, self._batches, advance)
            return Outcome(self._mean_scores(removed, candidates))
        race = Race(candidates, self.sequences, self._races.get(removed[:-1]) if removed else None)
        sizes = [len(batch) for batch in self.passes.batches]
        for batches in rounds(sizes, few=not self.passes.skippable.weights.resident):
            self._score_tokens(self.passes, metric, removed, race.contenders, batches, advance)
            for batch in batches:
                expected, seen = race.evaluations, range(batch + 1)
                race.drop_beaten(
                    {block: self.journal.scores(removed, block, seen) for block in race.contenders}
                )
                leader = self._leader(removed, race.contenders)
                advance(
                    expected - race.evaluations, f"{leader}, {len(race.contenders)} still racing"
                )
        self._races[removed] = race
        return race.outcome(self._mean_scores(removed, race.contenders))

    @torch.inference_mode()
    def _score_tokens(
        self,
        passes: Passes,
        metric: LogitMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        batches: Iterable[int | None],
        advance: Advance,
    ) -> None:
        # Without candidates, the model without the removed blocks is scored.
        blocks: Sequence[int | None] = candidates or [None]
        depth = len(self.passes.skippable.switches) + self.passes.skippable.head_blocks

        def cost(block: int) -> float:
            # A fork runs only the blocks behind the candidate, and shares those before it with
            # other candidates.
            return depth - block if passes.forks else 1.0

        names = [(removed, block, batch) for batch in batches for block in blocks]
        for mine in self._shares(names, advance, cost if candidates else None, count_own=False):
            jobs: list[Job] = [
                (batch, [block for _, block, _ in of_batch if block is not None])
                for batch, of_batch in groupby(mine, key=lambda name: name[2] or 0)
            ]
            # Keep the branches of the best: the next step probably starts at one. At first, the
            # step before tells them.
            best = ranking(
                self._mean_scores(removed, candidates)
                or self._mean_scores(removed[:-1], candidates)
            )
            for batch, block, scores in passes.score(metric, removed, jobs, best, advance):
                self.journal.add(scores, removed, block if candidates else None, batch)
                if candidates and block == candidates[-1]:
                    advance(0, self._leader(removed, candidates))

    def _leader(self, removed: Sequence[int], candidates: Sequence[int]) -> str:
        means = self._mean_scores(removed, candidates)
        return (
            f"best so far: block {(best := ranking(means)[0])} ({means[best]:.4f})" if means else ""
        )

    @torch.inference_mode()
    def _score_states(
        self,
        metric: HiddenStateMetric,
        removed: tuple[int, ...],
        spans: Sequence[tuple[int, ...]],
        longest: int,
        advance: Advance,
    ) -> Outcome:
        # One run of the model measures all spans of up to `longest` blocks, by the states before
        # and after each.
        blocks = sorted({block for span in spans for block in span})
        gone = {span[-1]: (*removed, *span[:-1]) for span in spans}
        for mine in self._shares(
            [(gone[last], last, batch) for batch in self._batches for last in gone], advance
        ):
            batches = list(dict.fromkeys(batch for _, _, batch in mine if batch is not None))
            scores_of = self.passes.score_states(
                batches, removed, blocks, partial(_mean_over_tokens, metric), longest
            )
            for batch, scores in scores_of.items():
                for (first, last), of_span in scores.items():
                    self.journal.add(of_span, (*removed, *range(first, last)), last, batch)
        return Outcome({last: self._mean_scores(gone[last], [last])[last] for last in gone})

    def _score_weights(
        self, metric: WeightMetric, candidates: Sequence[int], advance: Advance
    ) -> Mapping[int, float]:
        def compute() -> Mapping[int, float]:
            scores: dict[int, float] = {}
            skippable = self.passes.skippable
            with skippable.weights.visit(candidates) as visit:
                for block in candidates:
                    visit.load(block)
                    scores[block] = float(
                        metric.score_block(skippable.switches[block].block, block)
                    )
                    advance(self.sequences)
            return scores

        return self.journal.group.from_main(compute)

    @torch.inference_mode()
    def _score_models(
        self,
        metric: ModelMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        advance: Advance,
    ) -> Outcome:
        sequences = torch.cat(tuple(self.passes.batches))
        for mine in self._shares([(removed, block, None) for block in candidates], advance):
            for block in (block for _, block, _ in mine if block is not None):
                self.passes.skippable.skip({*removed, block})
                score = metric.score_model(self.passes.skippable.model, self.tokenizer, sequences)
                self.journal.add([float(score)], removed, block)
        return Outcome(self._mean_scores(removed, candidates))


def _mean_over_tokens(metric: HiddenStateMetric, entering: Tensor, leaving: Tensor) -> list[float]:
    scores = metric.score_tokens(entering.float(), leaving.float())
    means: list[float] = as_float64(scores).mean(-1).tolist()
    return means
