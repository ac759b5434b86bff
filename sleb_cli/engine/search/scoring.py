"""Score the removal of each candidate block, for each of the four kinds of metric.

A scorer takes the blocks removed so far and the candidates of this step, and returns a score for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64, in_smaller_pieces
from sleb_cli.engine.forward.gradients import blocks_with_gradients
from sleb_cli.engine.forward.passes import Listener, Passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE
from sleb_cli.engine.search.choices import Outcome, Score, require_finite
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.race import Race
from sleb_cli.engine.search.strategies import ScoreSpans
from sleb_cli.events import CandidateScored, LaterStepsForecast, Notify, RaceNarrowed, SearchAdvanced
from sleb_cli.plan import Engine
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelMetric,
    PluginError,
    WeightMetric,
)
from sleb_plugins.metrics.nll import NegativeLogLikelihood
from sleb_plugins.metrics.weighted import require_shape


@dataclass(frozen=True)
class Scoring:
    """What every scorer needs: passes over the calibration sequences, and the journal of measurements."""

    passes: Passes
    journal: Journal
    tokenizer: Any
    notify: Notify
    fast: bool = False
    winners: int = 1
    """How many winners a race has."""
    held_out: Passes | None = None
    """Passes over sequences that the search never scores."""

    @property
    def skippable(self) -> SkippableModel:
        """The model."""
        return self.passes.skippable

    @property
    def sequences(self) -> int:
        """The number of calibration sequences."""
        return sum(len(batch) for batch in self.passes.batches)

    def loss(
        self,
        removed: Sequence[int],
        advanced: Callable[[int], None] = lambda sequences: None,
        *,
        scores_are_losses: bool = False,
    ) -> float:
        """Return the mean negative log-likelihood, in nats per token, of the model without the removed blocks.

        If scores are losses, the score of the last removed block is taken.
        """
        return _mean(self.losses(removed, advanced, scores_are_losses=scores_are_losses))

    def losses(
        self,
        removed: Sequence[int],
        advanced: Callable[[int], None] = lambda sequences: None,
        *,
        scores_are_losses: bool = False,
    ) -> list[float]:
        """Return the loss of each sequence, whose mean is `loss`."""
        losses: list[float] = []
        for batch in range(len(self.passes.batches)):
            found = self.journal.find(removed[:-1], removed[-1], batch) if scores_are_losses and removed else None
            losses += found or self._measure(self.passes, batch, removed, batch)
            advanced(len(self.passes.batches[batch]))
        return losses

    def held_out_losses(self, removed: Sequence[int]) -> list[float]:
        """Return the loss of each held-out sequence; in the journal, their batches follow the calibration batches."""
        assert self.held_out is not None
        first = len(self.passes.batches)
        batches = range(len(self.held_out.batches))
        return [loss for batch in batches for loss in self._measure(self.held_out, batch, removed, first + batch)]

    @torch.inference_mode()
    def _measure(self, passes: Passes, batch: int, removed: Sequence[int], number: int) -> list[float]:
        """Return the losses of a batch from the journal, in which its number is `number`, or else measure them."""
        found = self.journal.find(removed, batch=number)
        if found is None:
            found = dict(passes.scores(NegativeLogLikelihood(), batch, removed, ()))[BASE]
            self.journal.add(found, removed, batch=number)
        return found

    def scorer(self, metric: Metric) -> tuple[Score, Engine]:
        """Choose how to compute `metric`."""
        if isinstance(metric, LogitMetric):
            return lambda removed, candidates: self._score_logits(metric, removed, candidates), self.passes.engine
        if isinstance(metric, HiddenStateMetric):
            engine: Engine = "fork" if self.passes.engine == "fork" else "plain"
            return lambda removed, candidates: self._score_states(metric, removed, candidates), engine
        if isinstance(metric, WeightMetric):
            return lambda removed, candidates: self._score_weights(metric, removed, candidates), "weights"
        assert isinstance(metric, ModelMetric)
        return lambda removed, candidates: self._score_models(metric, removed, candidates), "model"

    def span_scorer(self, metric: Metric, longest: int) -> ScoreSpans | None:
        """Choose how to score spans of up to `longest` blocks by a metric of single blocks.

        None if the metric sees the whole model: then the score of a span is that of the model without it.
        """
        if isinstance(metric, HiddenStateMetric):
            return lambda spans: self._score_spans(metric, spans, longest)
        if isinstance(metric, WeightMetric):
            known: dict[int, float] = {}
            return lambda spans: self._sum_over_spans(metric, spans, known)
        return None

    @torch.inference_mode()
    def _score_logits(self, metric: LogitMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score batch after batch; in a race, beaten candidates drop out after each."""
        race = Race(self.sequences, {block: [] for block in candidates}, winners=self.winners)
        for batch in range(len(self.passes.batches)):
            self.notify(LaterStepsForecast(self.passes.share_of_later_steps(candidates)))
            for block in race.contenders:
                if (found := self.journal.find(removed, block, batch)) is not None:
                    self.notify(SearchAdvanced(len(found), from_journal=True))
                    self._add(race, removed, block, found)
            missing = [block for block in race.contenders if self.journal.find(removed, block, batch) is None]
            if missing:
                for block, scores in self.passes.scores(metric, batch, removed, missing):
                    require_finite(sum(scores), removed, block)
                    self.journal.add(scores, removed, block, batch)
                    self._add(race, removed, block, scores)
            self.passes.ranking = race.ranking()
            if self.fast:
                expected = race.evaluations
                race.drop_beaten()
                self.notify(RaceNarrowed(len(removed) + 1, len(race.contenders), expected - race.evaluations))
        return race.outcome(fast=self.fast)

    def _add(self, race: Race, removed: Sequence[int], block: int, scores: Sequence[float]) -> None:
        race.add(block, scores)
        self.notify(CandidateScored(len(removed) + 1, block, race.mean(block)))

    @torch.inference_mode()
    def _score_states(self, metric: HiddenStateMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Run the model once, and score every block on the way."""
        scores: dict[int, list[float]] = {block: [] for block in candidates}

        def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[int, list[float]]]:
            yield block, _mean_over_tokens(metric, entering, leaving)

        for batch in range(len(self.passes.batches)):
            if any(self.journal.find(removed, block, batch) is None for block in candidates):
                for block, found in self.passes.watch(batch, removed, candidates, lambda: listen).items():
                    self.journal.add(found, removed, block, batch)
            for block in candidates:
                found = self.journal.find(removed, block, batch) or []
                scores[block] += found
                self.notify(SearchAdvanced(len(found)))
                self.notify(CandidateScored(len(removed) + 1, block, _mean(scores[block])))
        return Outcome({block: _mean(values) for block, values in scores.items()})

    @torch.inference_mode()
    def _score_spans(self, metric: HiddenStateMetric, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Score spans by what enters their first block and leaves their last, in one pass of the dense model."""
        scores: dict[int, list[float]] = {span[-1]: [] for span in spans}
        for batch in range(len(self.passes.batches)):
            if any(self.journal.find(span[:-1], span[-1], batch) is None for span in spans):
                self._watch_spans(metric, batch, range(spans[0][0], spans[-1][-1] + 1), longest)
            for span in spans:
                found = self.journal.find(span[:-1], span[-1], batch) or []
                scores[span[-1]] += found
                self.notify(SearchAdvanced(len(found)))
                self.notify(CandidateScored(len(span), span[-1], _mean(scores[span[-1]])))
        return Outcome({block: _mean(values) for block, values in scores.items()})

    def _watch_spans(self, metric: HiddenStateMetric, batch: int, blocks: range, longest: int) -> None:
        """Score all spans of up to `longest` of these blocks; at most `longest` states exist at once."""

        def start() -> Listener[tuple[int, int]]:
            entered: dict[int, Tensor] = {}

            def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[tuple[int, int], list[float]]]:
                entered[block] = entering
                entered.pop(block - longest, None)
                for start, state in entered.items():
                    yield (start, block), _mean_over_tokens(metric, state, leaving)

            return listen

        for (start_block, block), found in self.passes.watch(batch, (), blocks, start).items():
            self.journal.add(found, range(start_block, block), block, batch)

    def _sum_over_spans(
        self, metric: WeightMetric, spans: Sequence[tuple[int, ...]], known: dict[int, float]
    ) -> Outcome:
        """Add up the scores of a span's blocks in the dense model; each block is scored once."""
        blocks = sorted({block for span in spans for block in span} - known.keys())
        if blocks:
            known.update(self._score_weights(metric, (), blocks).scores)
        return Outcome({span[-1]: math.fsum(known[block] for block in span) for span in spans})

    def _score_weights(self, metric: WeightMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score each block's parameters, and their gradients if the metric needs them, in batches that fit."""
        scores: dict[int, float] = {}

        def score(size: int) -> None:
            left: Iterable[int] = [block for block in candidates if block not in scores]
            if metric.needs_gradients:
                left = blocks_with_gradients(self.passes.in_batches_of(size), removed, tuple(left))
            for block in left:
                scores[block] = _number(metric, metric.score_block(self.skippable.switches[block].block, block))
                self.notify(CandidateScored(len(removed) + 1, block, scores[block]))
                self.notify(SearchAdvanced(self.sequences))

        in_smaller_pieces(score, self.passes.budget.sequences if metric.needs_gradients else 1, lambda size: None)
        return Outcome({block: scores[block] for block in candidates})

    @torch.inference_mode()
    def _score_models(self, metric: ModelMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score the model once for each candidate, with it skipped."""
        sequences = torch.cat(tuple(self.passes.batches))
        scores: dict[int, float] = {}
        for block in candidates:
            found = self.journal.find(removed, block)
            if found is None:
                self.skippable.skip({*removed, block})
                found = [_number(metric, metric.score_model(self.skippable.model, self.tokenizer, sequences))]
                self.journal.add(found, removed, block)
            scores[block] = found[0]
            self.notify(CandidateScored(len(removed) + 1, block, scores[block]))
            self.notify(SearchAdvanced(self.sequences))
        return Outcome(scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_over_tokens(metric: HiddenStateMetric, entering: Tensor, leaving: Tensor) -> list[float]:
    scores = metric.score_tokens(entering.float(), leaving.float())
    require_shape(metric.name, scores, entering.shape[:-1])
    means: list[float] = as_float64(scores).mean(-1).tolist()
    return means


def _number(metric: Metric, score: Any) -> float:
    if not isinstance(score, int | float):
        raise PluginError(
            f"The metric {metric.name!r} returned {score!r}, which is not a number.",
            hint="Report it to the author of the metric.",
        )
    return float(score)
