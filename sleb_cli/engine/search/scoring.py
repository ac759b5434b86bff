"""The scores of candidates, for each kind of metric of blocks.

Only scores that the journal lacks are measured, but for those of weights, which it never holds.
Processes share that work: they deal it, measure, and exchange their scores after each turn, so they
decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.passes import Job, Passes
from sleb_cli.engine.search.choices import Outcome, ranking
from sleb_cli.engine.search.journal import Journal, Name
from sleb_cli.engine.search.race import Race, rounds
from sleb_cli.engine.search.shares import own_shares
from sleb_cli.events import SCORING_TASK, Advance, Notice, Notify, no_progress, task
from sleb_cli.order import SizeKey
from sleb_cli.plan import Method
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelMetric,
    OutputMetric,
    WeightMetric,
)


def engine_of(metric: Metric, passes: Passes) -> Method:
    """Name the way in which candidates are scored by this metric."""
    if isinstance(metric, WeightMetric):
        return "weights"
    if isinstance(metric, ModelMetric):
        return "model"
    return "fork" if passes.forks else "plain"


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
        """Return the loss of each sequence without these blocks: the negative log-likelihood in
        nats per token, or the distance from what the dense model puts out.
        """
        removed = tuple(removed)
        scored = self.scored_losses(removed)
        if scored and not held_out:
            return scored
        passes = self.held_out if held_out else self.passes
        assert passes is not None
        self._score_tokens(passes, self._loss_metric, removed, (), passes.numbers, advance)
        return self.journal.scores(removed, None, passes.numbers)

    @torch.inference_mode()
    def measure_losses(
        self,
        sizes: Sequence[SizeKey],
        *,
        held_out: bool = False,
        advance: Advance = no_progress,
    ) -> None:
        """Measure what `losses` returns of these sets of blocks, which share their walks."""
        passes = self.held_out if held_out else self.passes
        assert passes is not None
        names: list[Name] = []
        for batch in passes.numbers:
            names += [(removed, None, batch) for removed in sizes]
        missing = self._missing(names, advance)
        for share in self._deal(missing):
            unscored: dict[int, list[SizeKey]] = {}
            for removed, _, number in share:
                assert number is not None
                unscored.setdefault(number, []).append(removed)
            scored = passes.score_sizes(self._loss_metric, unscored, advance)
            for number, removed, losses in scored:
                self.journal.add(losses, removed, None, number)
            self._exchange(missing, advance, own_are_counted=True)

    @property
    def _loss_metric(self) -> LogitMetric | OutputMetric:
        return self.passes.skippable.ending.loss_metric

    def scored_losses(self, removed: SizeKey) -> list[float]:
        """Return the scores of the last removed block if they are losses, of all sequences."""
        if not removed or type(self.metric) is not type(self._loss_metric):
            return []
        scores = self.journal.scores(removed[:-1], removed[-1], self._batches)
        if len(scores) < self.sequences:
            return []
        return scores

    def score(self, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score each candidate after these removals; of a race, return the survivors' scores.

        Raises:
            ModelError: the dense model computes numbers that are not finite.
        """
        removed = tuple(removed)
        metric = self.metric
        evaluations = len(candidates) * self.sequences
        with task(self.notify, SCORING_TASK, evaluations, "evaluations") as advance:
            if isinstance(metric, LogitMetric | OutputMetric):
                outcome = self._score_logits(metric, removed, candidates, advance)
            elif isinstance(metric, HiddenStateMetric):
                spans = [(block,) for block in candidates]
                outcome = self._score_states(metric, removed, spans, 1, advance)
            elif isinstance(metric, WeightMetric):
                outcome = Outcome(self._score_weights(metric, candidates, advance))
            else:
                assert isinstance(metric, ModelMetric)
                outcome = self._score_models(metric, removed, candidates, advance)
        self._report_nonfinite(outcome, removed)
        return outcome

    def score_spans(self, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Score the model without each span of blocks, which will have up to `longest`."""
        metric = self.metric
        if not isinstance(metric, HiddenStateMetric | WeightMetric):
            scores = {}
            for span in spans:
                scores[span[-1]] = self.score(span[:-1], span[-1:]).scores[span[-1]]
            return Outcome(scores)
        evaluations = len(spans) * self.sequences
        with task(self.notify, SCORING_TASK, evaluations, "evaluations") as advance:
            if isinstance(metric, HiddenStateMetric):
                outcome = self._score_states(metric, (), spans, longest, advance)
            else:
                outcome = self._add_weight_scores(metric, spans, advance)
        self._report_nonfinite(outcome, ())
        return outcome

    def _report_nonfinite(self, outcome: Outcome, removed: Sequence[int]) -> None:
        """Name the candidates whose scores are NaN or infinite, unless the model is to blame."""
        worst = [block for block, score in outcome.scores.items() if score == math.inf]
        if not worst:
            return
        self.require_sound()
        which = f"block {worst[0]}"
        if len(worst) > 1:
            which = f"any of the blocks {', '.join(map(str, worst))}"
        if removed:
            which += f" (with {', '.join(map(str, removed))} removed)"
        self.notify(Notice(f"Without {which}, scores are NaN or infinite, so they rank last."))

    @torch.inference_mode()
    def _score_logits(
        self,
        metric: LogitMetric | OutputMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        advance: Advance,
    ) -> Outcome:
        if self.fast:
            return self._race(metric, removed, candidates, advance)
        self._score_tokens(self.passes, metric, removed, candidates, self._batches, advance)
        return Outcome(self._mean_scores(removed, candidates))

    def _race(
        self,
        metric: LogitMetric | OutputMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        advance: Advance,
    ) -> Outcome:
        before = self._races.get(removed[:-1]) if removed else None
        race = Race(candidates, self.sequences, before)
        sizes = [len(batch) for batch in self.passes.batches]
        for batches in rounds(sizes, few=not self.passes.skippable.weights.resident):
            self._score_tokens(self.passes, metric, removed, race.contenders, batches, advance)
            for batch in batches:
                expected = race.evaluations
                seen = range(batch + 1)
                scores = {}
                for block in race.contenders:
                    scores[block] = self.journal.scores(removed, block, seen)
                race.drop_beaten(scores)
                leader = self._leader(removed, race.contenders)
                note = f"{leader}, {len(race.contenders)} still racing"
                advance(expected - race.evaluations, note)
        self._races[removed] = race
        return race.outcome(self._mean_scores(removed, race.contenders))

    @torch.inference_mode()
    def _score_tokens(
        self,
        passes: Passes,
        metric: LogitMetric | OutputMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        batches: Iterable[int | None],
        advance: Advance,
    ) -> None:
        """Score batches without each candidate or, if there are none, without `removed` alone."""
        blocks: Sequence[int | None] = candidates or [None]
        missing = self._missing([(removed, block, n) for n in batches for block in blocks], advance)
        costs = self._costs(passes, candidates)
        for share in self._deal(missing, costs):
            jobs = jobs_of(share)
            # Keep the branches of the best: the next step probably starts at one. At first, the
            # step before tells them.
            means = self._mean_scores(removed, candidates)
            best = ranking(means or self._mean_scores(removed[:-1], candidates))
            for batch, block, scores in passes.score(metric, removed, jobs, best, advance):
                self.journal.add(scores, removed, block if candidates else None, batch)
                if candidates and block == candidates[-1]:
                    advance(0, self._leader(removed, candidates))
            self._exchange(missing, advance, own_are_counted=True)

    def _costs(self, passes: Passes, candidates: Sequence[int]) -> dict[int, float]:
        """Estimate how long each candidate takes on a batch, in runs of a block."""
        depth = len(self.passes.skippable.switches) + self.passes.skippable.head_blocks
        costs = {}
        for block in candidates:
            # A fork runs only the blocks behind the candidate, and shares those before it with
            # other candidates.
            costs[block] = depth - block if passes.forks else 1.0
        return costs

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
        # and after each. A span is named by its last block, which goes after its others.
        blocks = sorted({block for span in spans for block in span})
        before_last = {span[-1]: (*removed, *span[:-1]) for span in spans}
        names = [
            (before_last[last], last, batch) for batch in self._batches for last in before_last
        ]
        missing = self._missing(names, advance)
        for share in self._deal(missing):
            batches = list(dict.fromkeys(batch for _, _, batch in share if batch is not None))
            score = partial(_mean_over_tokens, metric)
            scores_of = self.passes.score_states(batches, removed, blocks, score, longest)
            for batch, scores in scores_of.items():
                for (first, last), of_span in scores.items():
                    self.journal.add(of_span, (*removed, *range(first, last)), last, batch)
            self._exchange(missing, advance)
        return Outcome(
            {last: self._mean_scores(before_last[last], [last])[last] for last in before_last}
        )

    def _score_weights(
        self, metric: WeightMetric, candidates: Sequence[int], advance: Advance
    ) -> Mapping[int, float]:
        """Score the candidates in the main process."""
        skippable = self.passes.skippable

        def compute() -> Mapping[int, float]:
            scores = {}
            with skippable.weights.visit(candidates) as visit:
                for block in candidates:
                    visit.load(block)
                    module = skippable.switches[block].block
                    scores[block] = float(metric.score_block(module, block))
                    advance(self.sequences)
            return scores

        return self.journal.group.from_main(compute)

    def _add_weight_scores(
        self, metric: WeightMetric, spans: Sequence[tuple[int, ...]], advance: Advance
    ) -> Outcome:
        """Score the weights of spans, which score as much as their blocks together."""
        blocks = {block for span in spans for block in span}
        new = sorted(blocks - self._weight_scores.keys())
        if new:
            scores = self._score_weights(metric, new, advance)
            self._weight_scores.update(Outcome(scores).scores)
        sums = {}
        for span in spans:
            sums[span[-1]] = math.fsum(self._weight_scores[block] for block in span)
        return Outcome(sums)

    @torch.inference_mode()
    def _score_models(
        self,
        metric: ModelMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        advance: Advance,
    ) -> Outcome:
        skippable = self.passes.skippable
        sequences = torch.cat([batch for batch in self.passes.batches if isinstance(batch, Tensor)])
        missing = self._missing([(removed, block, None) for block in candidates], advance)
        for share in self._deal(missing):
            for _, block, _ in share:
                assert block is not None
                skippable.skip({*removed, block})
                score = metric.score_model(skippable.model, self.tokenizer, sequences)
                self.journal.add([float(score)], removed, block)
            self._exchange(missing, advance)
        return Outcome(self._mean_scores(removed, candidates))

    def _missing(self, names: Iterable[Name], advance: Advance) -> dict[Name, None]:
        """Return those of the measurements that the journal lacks; the bar counts the others."""
        missing: dict[Name, None] = {}
        known = 0
        for name in names:
            scores = self.journal.find(*name)
            if scores:
                known += self._evaluations(name, scores)
            else:
                missing[name] = None
        advance(known)
        return missing

    def _deal(
        self, missing: Mapping[Name, None], costs: Mapping[int, float] | None = None
    ) -> list[list[Name]]:
        """Return this process's share of each turn; one turn reads streamed weights once."""
        at_once = not self.passes.skippable.weights.resident
        return own_shares(list(missing), self.journal.group, costs, at_once=at_once)

    def _exchange(
        self, missing: Mapping[Name, None], advance: Advance, *, own_are_counted: bool = False
    ) -> None:
        """Share the scores of this turn with the other processes, and count them."""
        for rank, measured in enumerate(self.journal.exchange()):
            if own_are_counted and rank == self.journal.group.rank:
                continue
            wanted = [item for item in measured if item[0] in missing]
            advance(sum(self._evaluations(name, scores) for name, scores in wanted))

    def _evaluations(self, name: Name, scores: Sequence[float]) -> int:
        _, _, batch = name
        return self.sequences if batch is None else len(scores)

    @property
    def _batches(self) -> Sequence[int | None]:
        return [None] if isinstance(self.metric, ModelMetric) else self.passes.numbers

    def _mean_scores(self, removed: Sequence[int], blocks: Sequence[int]) -> dict[int, float]:
        means = {}
        for block in blocks:
            scores = self.journal.scores(removed, block, self._batches)
            if scores:
                means[block] = fmean(scores)
        return means

    def _leader(self, removed: Sequence[int], candidates: Sequence[int]) -> str:
        means = self._mean_scores(removed, candidates)
        if not means:
            return ""
        best = ranking(means)[0]
        return f"best so far: block {best} ({means[best]:.4f})"


def jobs_of(names: Iterable[Name]) -> list[Job]:
    """Return each batch of these measurements, with its candidates."""
    candidates: dict[int, list[int]] = {}
    for _, block, batch in names:
        assert batch is not None
        of_batch = candidates.setdefault(batch, [])
        if block is not None:
            of_batch.append(block)
    return list(candidates.items())


def _mean_over_tokens(
    metric: HiddenStateMetric, entering: Tensor, leaving: Tensor, mask: Tensor | None
) -> list[float]:
    scores = as_float64(metric.score_tokens(entering.float(), leaving.float()))
    if mask is None:
        means: list[float] = scores.mean(-1).tolist()
        return means
    counted = mask.to(scores.device)
    means = ((scores * counted).sum(-1) / counted.sum(-1)).tolist()
    return means
