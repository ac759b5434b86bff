"""Score the removal of each candidate block, for each of the four kinds of metric.

A scorer takes the blocks removed so far and the candidates of this step, and returns a score for each. Processes share
the work, and after each turn all of them have all measurements in their journals, so they decide alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64, in_smaller_pieces
from sleb_cli.engine.forward.gradients import blocks_with_gradients
from sleb_cli.engine.forward.passes import Listener, Passes, Unit
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup, Turn, deal
from sleb_cli.engine.search.choices import Outcome, Score, comparable
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.race import Race, rounds
from sleb_cli.engine.search.shares import EQUAL_COSTS, Costs, at_once, costs_of_fork, deal_units
from sleb_cli.engine.search.strategies import ScoreSpans
from sleb_cli.events import CandidateScored, LaterStepsForecast, Notice, Notify, RaceNarrowed, SearchAdvanced
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

T = TypeVar("T")
R = TypeVar("R")


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
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that share the work."""
    require_sound: Callable[[], None] = lambda: None
    """Raises an error if the dense model itself computes numbers that are not finite."""

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
        batches = range(len(self.passes.batches))
        found = {
            batch: self.journal.find(removed[:-1], removed[-1], batch) if scores_are_losses and removed else None
            for batch in batches
        }
        found |= self._measure(self.passes, [batch for batch in batches if not found[batch]], removed, 0, advanced)
        return [loss for batch in batches for loss in found[batch] or ()]

    def held_out_losses(self, removed: Sequence[int]) -> list[float]:
        """Return the loss of each held-out sequence; in the journal, their batches follow the calibration batches."""
        assert self.held_out is not None
        batches = range(len(self.held_out.batches))
        found = self._measure(self.held_out, batches, removed, len(self.passes.batches))
        return [loss for batch in batches for loss in found[batch]]

    @torch.inference_mode()
    def _measure(
        self,
        passes: Passes,
        batches: Sequence[int],
        removed: Sequence[int],
        first: int,
        advanced: Callable[[int], None] = lambda sequences: None,
    ) -> dict[int, list[float]]:
        """Return the losses of batches, from the journal, where the first batch has the number `first`, or measured."""
        known = {batch: self.journal.find(removed, batch=first + batch) for batch in batches}
        losses = {batch: found for batch, found in known.items() if found is not None}
        metric, missing = NegativeLogLikelihood(), [batch for batch in batches if batch not in losses]

        def measure(mine: Sequence[int]) -> Iterator[tuple[int, int, list[float]]]:
            return passes.score_units(metric, removed, [(batch, ()) for batch in mine])

        for found in losses.values():
            advanced(len(found))
        for _, (batch, _, found) in self._share(deal(missing, self.group.size), measure):
            self.journal.add(found, removed, batch=first + batch)
            losses[batch] = found
            advanced(len(found))
        return losses

    def _share(
        self, turns: Iterable[Turn[T]], measure: Callable[[Sequence[T]], Iterable[R]]
    ) -> Iterator[tuple[int, R]]:
        """Yield what is measured in turns, the same in all processes, each with the rank of who measured it."""
        if not self.skippable.weights.resident:
            turns = at_once(turns)  # each process reads the weights once for all that it measures
        for turn in turns:
            yield from self.group.in_turn(measure(turn[self.group.rank]))

    def scorer(self, metric: Metric) -> tuple[Score, Engine]:
        """Choose how to compute `metric`; scores that are not finite numbers come out as the worst."""
        score, engine = self._scorer(metric)
        return lambda removed, candidates: self._judged(score(removed, candidates), removed), engine

    def _judged(self, outcome: Outcome, removed: Sequence[int]) -> Outcome:
        """Let a score that is not finite count as the worst, if it is the removal that makes it so.

        Raises:
            ModelError: it is the dense model.
        """
        scores = {block: comparable(score) for block, score in outcome.scores.items()}
        if worst := [block for block, score in scores.items() if score == math.inf]:
            self.require_sound()
            after = f" (with {', '.join(map(str, removed))} removed)" if removed else ""
            which = f"block {worst[0]}" if len(worst) == 1 else f"any of the blocks {', '.join(map(str, worst))}"
            self.notify(Notice(f"Without {which}{after}, scores are not finite numbers, which count as the worst."))
        return Outcome(scores, outcome.race)

    def _scorer(self, metric: Metric) -> tuple[Score, Engine]:
        engine: Engine = "fork" if self.passes.forks else "plain"
        if isinstance(metric, LogitMetric):
            return lambda removed, candidates: self._score_logits(metric, removed, candidates), engine
        if isinstance(metric, HiddenStateMetric):
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
            return lambda spans: self._judged(self._score_spans(metric, spans, longest), ())
        if isinstance(metric, WeightMetric):
            known: dict[int, float] = {}
            return lambda spans: self._judged(self._sum_over_spans(metric, spans, known), ())
        return None

    @torch.inference_mode()
    def _score_logits(self, metric: LogitMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score the candidates batch by batch; in a race, the beaten drop out on the way."""
        race = Race(self.sequences, {block: [] for block in candidates}, winners=self.winners)
        sizes = [len(batch) for batch in self.passes.batches]
        progress = _Progress(self.notify, len(removed) + 1)
        few = not self.skippable.weights.resident
        for batches in rounds(sizes, few=few) if self.fast else [range(len(sizes))]:
            self._score_round(metric, removed, race.contenders, batches, progress)
            for batch in batches:
                for block in race.contenders:
                    race.add(block, self.journal.find(removed, block, batch) or ())
                if self.fast:
                    expected = race.evaluations
                    race.drop_beaten()
                    self.notify(RaceNarrowed(len(removed) + 1, len(race.contenders), expected - race.evaluations))
        self.passes.ranking = race.ranking()
        return race.outcome(fast=self.fast)

    def _score_round(
        self,
        metric: LogitMetric,
        removed: Sequence[int],
        contenders: Sequence[int],
        batches: Iterable[int],
        progress: _Progress,
    ) -> None:
        """Score the contenders on these batches, as far as the journal does not have them."""
        units: list[Unit] = []
        for batch in batches:
            known = {block: self.journal.find(removed, block, batch) for block in contenders}
            for block, found in known.items():
                if found is not None:
                    progress.add(block, found, from_journal=True)
            if missing := [block for block in contenders if known[block] is None]:
                units.append((batch, missing))

        def measure(mine: Sequence[Unit]) -> Iterator[tuple[int, int, list[float]]]:
            self.passes.ranking = progress.ranking(contenders) or self.passes.ranking
            self.notify(LaterStepsForecast(self.passes.share_of_later_steps(contenders)))
            return self.passes.score_units(metric, removed, mine)

        turns = deal_units(units, self.group.size, self._costs)
        for rank, (batch, block, scores) in self._share(turns, measure):
            self.journal.add(scores, removed, block, batch)
            progress.add(block, scores, advanced=rank != self.group.rank)

    @cached_property
    def _costs(self) -> Costs:
        if not self.passes.forks:
            return EQUAL_COSTS
        return costs_of_fork(len(self.skippable.switches), self.skippable.head_blocks)

    @torch.inference_mode()
    def _score_states(self, metric: HiddenStateMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Run the model once, and score every block on the way."""

        def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[int, list[float]]]:
            yield block, _mean_over_tokens(metric, entering, leaving)

        def measure(mine: Sequence[int]) -> Iterator[tuple[int, int, list[float]]]:
            watched = self.passes.score_states(mine, removed, candidates, lambda: listen)
            return ((batch, block, found) for batch, scores in watched.items() for block, found in scores.items())

        progress, missing = _Progress(self.notify, len(removed) + 1), []
        for batch in range(len(self.passes.batches)):
            known = {block: self.journal.find(removed, block, batch) for block in candidates}
            if None in known.values():
                missing.append(batch)
            else:
                progress.add_all(known)
        for _, (batch, block, found) in self._share(deal(missing, self.group.size), measure):
            self.journal.add(found, removed, block, batch)
            progress.add(block, found)
        return Outcome({block: progress.mean(block) for block in candidates})

    @torch.inference_mode()
    def _score_spans(self, metric: HiddenStateMetric, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Score spans by what enters their first block and leaves their last, in one pass of the dense model."""
        blocks = range(spans[0][0], spans[-1][-1] + 1)
        progress, missing = _Progress(self.notify, len(spans[0])), []
        for batch in range(len(self.passes.batches)):
            known = {span[-1]: self.journal.find(span[:-1], span[-1], batch) for span in spans}
            if None in known.values():
                missing.append(batch)
            else:
                progress.add_all(known)

        def measure(mine: Sequence[int]) -> Iterator[tuple[int, tuple[int, int], list[float]]]:
            watched = self._watch_spans(metric, mine, blocks, longest)
            return ((batch, span, found) for batch, scores in watched.items() for span, found in scores.items())

        wanted = {(span[0], span[-1]) for span in spans}
        for _, (batch, (start, block), found) in self._share(deal(missing, self.group.size), measure):
            self.journal.add(found, range(start, block), block, batch)
            if (start, block) in wanted:
                progress.add(block, found)
        return Outcome({span[-1]: progress.mean(span[-1]) for span in spans})

    def _watch_spans(
        self, metric: HiddenStateMetric, batches: Sequence[int], blocks: range, longest: int
    ) -> dict[int, dict[tuple[int, int], list[float]]]:
        """Score all spans of up to `longest` of these blocks, by their ends; at most `longest` states exist at once."""

        def start() -> Listener[tuple[int, int]]:
            entered: dict[int, Tensor] = {}

            def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[tuple[int, int], list[float]]]:
                entered[block] = entering
                entered.pop(block - longest, None)
                for start, state in entered.items():
                    yield (start, block), _mean_over_tokens(metric, state, leaving)

            return listen

        return self.passes.score_states(batches, (), blocks, start, remembered=longest)

    def _sum_over_spans(
        self, metric: WeightMetric, spans: Sequence[tuple[int, ...]], known: dict[int, float]
    ) -> Outcome:
        """Add up the scores of a span's blocks in the dense model; each block is scored once."""
        blocks = sorted({block for span in spans for block in span} - known.keys())
        if blocks:
            known.update(self._score_weights(metric, (), blocks).scores)
        return Outcome({span[-1]: math.fsum(known[block] for block in span) for span in spans})

    def _score_weights(self, metric: WeightMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score each block's parameters, and their gradients if the metric needs them, in batches that fit.

        Gradients are sums over all batches, whose order changes the last bits, so the main process computes them.
        """
        return self.group.from_main(lambda: self._weight_scores(metric, removed, candidates))

    def _weight_scores(self, metric: WeightMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        scores: dict[int, float] = {}

        def score(size: int) -> None:
            left = [block for block in candidates if block not in scores]
            visited = (
                blocks_with_gradients(self.passes.in_batches_of(size), removed, left)
                if metric.needs_gradients
                else self.skippable.weights.visit(left)
            )
            for block in visited:
                scores[block] = _number(metric, metric.score_block(self.skippable.switches[block].block, block))
                self.notify(CandidateScored(len(removed) + 1, block, scores[block]))
                self.notify(SearchAdvanced(self.sequences))

        in_smaller_pieces(score, self.passes.budget.sequences if metric.needs_gradients else 1, lambda size: None)
        return Outcome({block: scores[block] for block in candidates})

    @torch.inference_mode()
    def _score_models(self, metric: ModelMetric, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Score the model once for each candidate, with it skipped."""
        sequences = torch.cat(tuple(self.passes.batches))
        known = {block: self.journal.find(removed, block) for block in candidates}
        scores = {block: found[0] for block, found in known.items() if found is not None}

        def measure(mine: Sequence[int]) -> Iterator[tuple[int, float]]:
            for block in mine:
                self.skippable.skip({*removed, block})
                yield block, _number(metric, metric.score_model(self.skippable.model, self.tokenizer, sequences))

        def tell(block: int, score: float) -> None:
            self.notify(CandidateScored(len(removed) + 1, block, score))
            self.notify(SearchAdvanced(self.sequences))

        for block, score in scores.items():
            tell(block, score)
        missing = [block for block in candidates if block not in scores]
        for _, (block, score) in self._share(deal(missing, self.group.size), measure):
            self.journal.add([score], removed, block)
            scores[block] = score
            tell(block, score)
        return Outcome({block: scores[block] for block in candidates})


class _Progress:
    """The scores of a step as they come, in any order of the batches, and what is told of them."""

    def __init__(self, notify: Notify, step: int) -> None:
        self._notify, self._step = notify, step
        self._scores: defaultdict[int, list[float]] = defaultdict(list)

    def add(self, block: int, scores: Sequence[float], *, advanced: bool = True, from_journal: bool = False) -> None:
        """Add scores of a candidate; `advanced` unless their evaluations were reported while they were computed."""
        self._scores[block] += map(comparable, scores)
        if advanced:
            self._notify(SearchAdvanced(len(scores), from_journal=from_journal))
        self._notify(CandidateScored(self._step, block, self.mean(block)))

    def add_all(self, known: Mapping[int, Sequence[float] | None]) -> None:
        """Add the scores of several candidates."""
        for block, scores in known.items():
            self.add(block, scores or ())

    def mean(self, block: int) -> float:
        """Return the mean of a candidate's scores so far."""
        return _mean(self._scores[block])

    def ranking(self, among: Sequence[int]) -> list[int]:
        """Return those that have scores, best first."""
        return sorted((block for block in among if block in self._scores), key=lambda b: (self.mean(b), b))


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
