"""Score the removal of each candidate block, for each of the four kinds of metric.

A scorer takes the blocks removed so far and the candidates of this step, and gives a score for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.forward.gradients import blocks_with_gradients
from sleb_cli.engine.forward.logits import require_shape
from sleb_cli.engine.forward.passes import Passes
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


@dataclass(frozen=True)
class Scoring:
    """What every scorer works on: passes over the calibration sequences, and the journal of what was measured."""

    passes: Passes
    journal: Journal
    tokenizer: Any
    notify: Notify
    fast: bool = False
    winners: int = 1
    """How many of a race's candidates are wanted."""
    held_out: Passes | None = None
    """Passes over sequences that are never searched on."""

    @property
    def skippable(self) -> SkippableModel:
        """The model."""
        return self.passes.skippable

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are."""
        return sum(len(batch) for batch in self.passes.batches)

    def loss(
        self,
        removed: Sequence[int],
        advanced: Callable[[int], None] = lambda sequences: None,
        *,
        scores_are_losses: bool = False,
    ) -> float:
        """Give the mean negative log-likelihood, in nats per token, of the model without the removed blocks.

        Where scores are losses, one of the last removed block is as good.
        """
        return _mean(self.losses(removed, advanced, scores_are_losses=scores_are_losses))

    def losses(
        self,
        removed: Sequence[int],
        advanced: Callable[[int], None] = lambda sequences: None,
        *,
        scores_are_losses: bool = False,
    ) -> list[float]:
        """Give what `loss` is the mean of: the loss of each sequence."""
        losses: list[float] = []
        for batch in range(len(self.passes.batches)):
            found = self.journal.find(removed[:-1], removed[-1], batch) if scores_are_losses and removed else None
            losses += found or self._measure(self.passes, batch, removed, batch)
            advanced(len(self.passes.batches[batch]))
        return losses

    def held_out_losses(self, removed: Sequence[int]) -> list[float]:
        """Give the loss of each sequence that is held out; in the journal, their batches follow those searched on."""
        assert self.held_out is not None
        first = len(self.passes.batches)
        batches = range(len(self.held_out.batches))
        return [loss for batch in batches for loss in self._measure(self.held_out, batch, removed, first + batch)]

    @torch.inference_mode()
    def _measure(self, passes: Passes, batch: int, removed: Sequence[int], number: int) -> list[float]:
        """Give the losses of a batch from the journal, where its number is `number`; else measure them."""
        found = self.journal.find(removed, batch=number)
        if found is None:
            found = dict(passes.scores(NegativeLogLikelihood(), batch, removed, ()))[BASE]
            self.journal.add(found, removed, batch=number)
        return found

    def scorer(self, metric: Metric) -> tuple[Score, Engine]:
        """Choose how `metric` is computed."""
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
        """Choose how spans of up to `longest` blocks score by what a metric sees of blocks.

        None where it sees the whole model: then a span scores what the model scores without it.
        """
        if isinstance(metric, HiddenStateMetric):
            return lambda spans: self._score_spans(metric, spans, longest)
        if isinstance(metric, WeightMetric):
            known: dict[int, float] = {}
            return lambda spans: self._sum_over_spans(metric, spans, known)
        return None

    @torch.inference_mode()
    def _score_logits(self, metric: LogitMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score batch after batch; in a race, those who are beaten drop out after each."""
        race = Race(self.sequences, len(self.passes.batches), {block: [] for block in candidates}, winners=self.winners)
        for batch in range(len(self.passes.batches)):
            self.notify(LaterStepsForecast(self.passes.share_of_later_steps(candidates)))
            for block in race.contenders:
                if (found := self.journal.find(removed, block, batch)) is not None:
                    self.notify(SearchAdvanced(len(found), found=True))
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
        for batch in range(len(self.passes.batches)):

            def look(block: int, entering: Tensor, leaving: Tensor, batch: int = batch) -> None:
                tokens = metric.score_tokens(entering.float(), leaving.float())
                require_shape(metric.name, tokens, entering.shape[:-1])
                self.journal.add(tokens.double().mean(-1).tolist(), removed, block, batch)

            if any(self.journal.find(removed, block, batch) is None for block in candidates):
                self.passes.watch(batch, removed, candidates, look)
            for block in candidates:
                found = self.journal.find(removed, block, batch) or []
                scores[block] += found
                self.notify(SearchAdvanced(len(found)))
                self.notify(CandidateScored(len(removed) + 1, block, _mean(scores[block])))
        return Outcome({block: _mean(values) for block, values in scores.items()})

    @torch.inference_mode()
    def _score_spans(self, metric: HiddenStateMetric, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Hold what enters a span's first block against what leaves its last, in the dense model: in one pass."""
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
        """Score all spans among these blocks that are not too long; so many states exist at once."""
        entered: dict[int, Tensor] = {}

        def look(block: int, entering: Tensor, leaving: Tensor) -> None:
            entered[block] = entering
            entered.pop(block - longest, None)
            for start, state in entered.items():
                tokens = metric.score_tokens(state.float(), leaving.float())
                require_shape(metric.name, tokens, entering.shape[:-1])
                self.journal.add(tokens.double().mean(-1).tolist(), range(start, block), block, batch)

        self.passes.watch(batch, (), blocks, look)

    def _sum_over_spans(
        self, metric: WeightMetric, spans: Sequence[tuple[int, ...]], known: dict[int, float]
    ) -> Outcome:
        """Add up what the blocks of a span score in the dense model, where each is looked at once."""
        blocks = sorted({block for span in spans for block in span} - known.keys())
        if blocks:
            known.update(self._score_weights(metric, (), blocks).scores)
        return Outcome({span[-1]: math.fsum(known[block] for block in span) for span in spans})

    def _score_weights(self, metric: WeightMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Look at each block's parameters, with gradients where the metric asks for them."""
        blocks = blocks_with_gradients(self.passes, removed, candidates) if metric.needs_gradients else candidates
        scores: dict[int, float] = {}
        for block in blocks:
            scores[block] = _number(metric, metric.score_block(self.skippable.switches[block].block, block))
            self.notify(CandidateScored(len(removed) + 1, block, scores[block]))
            self.notify(SearchAdvanced(self.sequences))
        return Outcome({block: scores[block] for block in candidates})

    @torch.inference_mode()
    def _score_models(self, metric: ModelMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Hand the gated model over, once for each candidate."""
        sequences = torch.cat(tuple(self.passes.batches))
        scores: dict[int, float] = {}
        for block in candidates:
            found = self.journal.find(removed, block)
            if found is None:
                self.skippable.switch_off({*removed, block})
                found = [_number(metric, metric.score_model(self.skippable.model, self.tokenizer, sequences))]
                self.journal.add(found, removed, block)
            scores[block] = found[0]
            self.notify(CandidateScored(len(removed) + 1, block, scores[block]))
            self.notify(SearchAdvanced(self.sequences))
        return Outcome(scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _number(metric: Metric, score: Any) -> float:
    if not isinstance(score, int | float):
        raise PluginError(f"The metric {metric.name!r} gave {score!r}, which is not a number.", hint="Tell its author.")
    return float(score)
