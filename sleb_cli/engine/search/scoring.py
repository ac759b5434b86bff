"""Score the removal of each candidate block, for each of the four kinds of metric.

What the journal does not have is measured. Processes share that work, and after each turn all of them have all
measurements in their journals, so they decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.logits import require_shape
from sleb_cli.engine.forward.passes import Job, Listener, Passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup, Turn, deal
from sleb_cli.engine.search.choices import Outcome, ranking
from sleb_cli.engine.search.journal import Journal, Name
from sleb_cli.engine.search.race import Race, rounds
from sleb_cli.engine.search.shares import at_once, deal_jobs
from sleb_cli.events import SCORING_TASK, Advance, Notice, Notify, no_progress, task
from sleb_cli.plan import Engine
from sleb_plugins import HiddenStateMetric, LogitMetric, Metric, ModelMetric, PluginError, WeightMetric
from sleb_plugins.metrics.nll import NegativeLogLikelihood

T = TypeVar("T")

Scores = tuple[Name, list[float]]
"""What was measured, and the score of each sequence."""


def engine_of(metric: Metric, passes: Passes) -> Engine:
    """Return how candidates are scored by this metric."""
    if isinstance(metric, WeightMetric):
        return "weights"
    return "model" if isinstance(metric, ModelMetric) else "fork" if passes.forks else "plain"


@dataclass(frozen=True)
class Scoring:
    """Scores candidates and measures losses by passes over the calibration sequences, and keeps them in the journal.

    Attributes:
        metric: scores the candidates.
        passes: run the calibration sequences through the model.
        journal: holds every score.
        tokenizer: the model's, for metrics that run the whole model.
        notify: the listener for events.
        fast: whether candidates race.
        held_out: passes over sequences that the search never scores.
        group: the processes that share the work.
        require_sound: raises an error if the dense model itself computes numbers that are not finite.
    """

    metric: Metric
    passes: Passes
    journal: Journal
    tokenizer: Any
    notify: Notify
    fast: bool = False
    held_out: Passes | None = None
    group: ProcessGroup = field(default_factory=ProcessGroup)
    require_sound: Callable[[], None] = lambda: None
    _of_weights: dict[int, float] = field(default_factory=dict, init=False)
    _races: dict[tuple[int, ...], Race] = field(default_factory=dict, init=False)
    """The races so far, by the blocks that were gone."""

    @property
    def skippable(self) -> SkippableModel:
        """The model."""
        return self.passes.skippable

    @property
    def sequences(self) -> int:
        """The number of calibration sequences."""
        return sum(len(batch) for batch in self.passes.batches)

    def losses(self, removed: Sequence[int], *, held_out: bool = False, advance: Advance = no_progress) -> list[float]:
        """Return the negative log-likelihood of each sequence without these blocks, in nats per token.

        If the metric is that, the scores of the last removed block are taken. In the journal, the batches of held-out
        sequences follow the calibration batches.
        """
        removed = tuple(removed)
        if removed and self.metric.name == "nll" and not held_out:
            scores = self.journal.scores(removed[:-1], removed[-1], self._batches)
            if len(scores) == self.sequences:
                return scores
        passes, first = self.passes, 0
        if held_out:
            assert self.held_out is not None
            passes, first = self.held_out, len(self.passes.batches)
        batches = range(first, first + len(passes.batches))
        self._score_tokens(passes, NegativeLogLikelihood(), removed, (), batches, advance, first)
        return self.journal.scores(removed, None, batches)

    def _measure(
        self,
        wanted: Sequence[Name],
        share_out: Callable[[list[Name]], Iterable[Turn[T]]],
        measure: Callable[[Sequence[T]], Iterable[Scores]],
        advance: Advance,
        *,
        tells_own: bool = False,
    ) -> None:
        """Measure what is wanted and not in the journal; afterwards the journals of all processes have it.

        `share_out` divides what is missing among the processes, in turns; `measure` takes the share of one, and if it
        `tells_own`, it advances by that itself.
        """
        missing = [name for name in wanted if self.journal.find(*name) is None]
        advance(sum(map(self._evaluations, wanted)) - sum(map(self._evaluations, missing)))
        turns = share_out(missing)
        if not self.skippable.weights.resident:
            turns = at_once(turns)  # each process reads the weights once for all that it measures
        fresh = set(missing)
        for turn in turns:
            for rank, (name, scores) in self.group.in_turn(measure(turn[self.group.rank])):
                self.journal.add(scores, *name)
                if name in fresh and not (tells_own and rank == self.group.rank):
                    advance(self._evaluations(name))

    def _evaluations(self, name: Name) -> int:
        """Return on how many sequences a candidate is evaluated for this measurement."""
        batch = name[2]
        if batch is None:
            return self.sequences
        of_all = [*self.passes.batches, *(self.held_out.batches if self.held_out else ())]
        return len(of_all[batch])

    @property
    def _batches(self) -> Sequence[int | None]:
        """The batches by which the journal has the scores of a candidate."""
        return [None] if isinstance(self.metric, ModelMetric) else range(len(self.passes.batches))

    def _means(self, removed: Sequence[int], blocks: Sequence[int]) -> dict[int, float]:
        """Return the mean scores so far, of the candidates that have any."""
        found = {block: self.journal.scores(removed, block, self._batches) for block in blocks}
        return {block: fmean(scores) for block, scores in found.items() if scores}

    def score(self, removed: Sequence[int], candidates: Sequence[int]) -> Outcome:
        """Return the score of each candidate after these removals, or after a race, of each survivor.

        Raises:
            ModelError: the dense model computes numbers that are not finite.
        """
        removed, metric = tuple(removed), self.metric
        with task(self.notify, SCORING_TASK, len(candidates) * self.sequences, "evaluations") as advance:
            if isinstance(metric, LogitMetric):
                outcome = self._score_logits(metric, removed, candidates, advance)
            elif isinstance(metric, HiddenStateMetric):
                outcome = self._score_states(metric, removed, [(block,) for block in candidates], 1, advance)
            elif isinstance(metric, WeightMetric):
                outcome = Outcome(self._score_weights(metric, candidates, advance))
            else:
                assert isinstance(metric, ModelMetric)
                outcome = self._score_models(metric, removed, candidates, advance)
        return self._judged(outcome, removed)

    def score_spans(self, spans: Sequence[tuple[int, ...]], longest: int) -> Outcome:
        """Return the score of the model without each span of blocks, which will have up to `longest`.

        A metric of hidden states scores what enters and leaves a span; the scores of weights are added up.
        """
        metric = self.metric
        if not isinstance(metric, HiddenStateMetric | WeightMetric):
            return Outcome({span[-1]: self.score(span[:-1], span[-1:]).scores[span[-1]] for span in spans})
        with task(self.notify, SCORING_TASK, len(spans) * self.sequences, "evaluations") as advance:
            if isinstance(metric, HiddenStateMetric):
                outcome = self._score_states(metric, (), spans, longest, advance)
            else:
                if new := sorted({block for span in spans for block in span} - self._of_weights.keys()):
                    self._of_weights.update(Outcome(self._score_weights(metric, new, advance)).scores)
                outcome = Outcome({span[-1]: math.fsum(self._of_weights[b] for b in span) for span in spans})
        return self._judged(outcome, ())

    def _judged(self, outcome: Outcome, removed: Sequence[int]) -> Outcome:
        """Let a score that is not finite count as the worst, if it is the removal that makes it so."""
        if worst := [block for block, score in outcome.scores.items() if score == math.inf]:
            self.require_sound()
            after = f" (with {', '.join(map(str, removed))} removed)" if removed else ""
            which = f"block {worst[0]}" if len(worst) == 1 else f"any of the blocks {', '.join(map(str, worst))}"
            self.notify(Notice(f"Without {which}{after}, scores are NaN or infinite, so they rank last."))
        return outcome

    @torch.inference_mode()
    def _score_logits(
        self, metric: LogitMetric, removed: tuple[int, ...], candidates: Sequence[int], advance: Advance
    ) -> Outcome:
        """Score the candidates batch by batch; in a race, the beaten drop out on the way."""
        if not self.fast:
            self._score_tokens(self.passes, metric, removed, candidates, self._batches, advance)
            return Outcome(self._means(removed, candidates))
        race = Race(candidates, self.sequences, self._races.get(removed[:-1]) if removed else None)
        sizes = [len(batch) for batch in self.passes.batches]
        for batches in rounds(sizes, few=not self.skippable.weights.resident):
            self._score_tokens(self.passes, metric, removed, race.contenders, batches, advance)
            for batch in batches:
                expected, seen = race.evaluations, range(batch + 1)
                race.drop_beaten({block: self.journal.scores(removed, block, seen) for block in race.contenders})
                leader = self._leader(removed, race.contenders)
                advance(expected - race.evaluations, f"{leader}, {len(race.contenders)} still racing")
        self._races[removed] = race
        return race.outcome(self._means(removed, race.contenders))

    @torch.inference_mode()
    def _score_tokens(
        self,
        passes: Passes,
        metric: LogitMetric,
        removed: tuple[int, ...],
        candidates: Sequence[int],
        batches: Iterable[int | None],
        advance: Advance,
        first: int = 0,
    ) -> None:
        """Score the model without each candidate, or without candidates, as it stands.

        `first` is the number in the journal of the first batch of `passes`.
        """
        depth = len(self.skippable.switches) + self.skippable.head_blocks

        def share_out(missing: list[Name]) -> Iterator[Turn[Job]]:
            jobs: list[Job] = [
                (batch - first, [block for _, block, _ in names if block is not None])
                for batch, names in groupby(missing, key=lambda name: name[2] or 0)
            ]
            # About how many blocks a candidate runs, of those it shares with others only what the last one did not.
            return deal_jobs(jobs, self.group.size, lambda block: depth - block if passes.forks else 1.0)

        def measure(mine: Sequence[Job]) -> Iterator[Scores]:
            # The next step probably starts at one of the best so far, or else of those in the step before.
            best = ranking(self._means(removed, candidates) or self._means(removed[:-1], candidates))
            for batch, block, scores in passes.score(metric, removed, mine, best, advance):
                yield (removed, block if candidates else None, first + batch), scores
                if candidates and block == candidates[-1]:
                    advance(0, self._leader(removed, candidates))

        blocks: Sequence[int | None] = candidates or [None]
        wanted = [(removed, block, batch) for batch in batches for block in blocks]
        self._measure(wanted, share_out, measure, advance, tells_own=True)

    def _leader(self, removed: Sequence[int], candidates: Sequence[int]) -> str:
        means = self._means(removed, candidates)
        return f"best so far: block {(best := ranking(means)[0])} ({means[best]:.4f})" if means else ""

    @torch.inference_mode()
    def _score_states(
        self,
        metric: HiddenStateMetric,
        removed: tuple[int, ...],
        spans: Sequence[tuple[int, ...]],
        longest: int,
        advance: Advance,
    ) -> Outcome:
        """Score spans by what enters their first block and leaves their last, in one run of the model as it stands.

        All spans of up to `longest` of these blocks are measured, and at most `longest` states exist at once.
        """
        blocks = sorted({block for span in spans for block in span})

        def start() -> Listener[tuple[int, int]]:
            entered: dict[int, Tensor] = {}

            def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[tuple[int, int], list[float]]]:
                entered[block] = entering
                for first in [first for first in entered if block - first >= longest]:
                    del entered[first]
                for first, state in entered.items():
                    yield (first, block), _mean_over_tokens(metric, state, leaving)

            return listen

        def share_out(missing: list[Name]) -> Iterator[Turn[int]]:
            batches = dict.fromkeys(batch for _, _, batch in missing if batch is not None)
            return deal([*batches], self.group.size)

        def measure(mine: Sequence[int]) -> Iterator[Scores]:
            watched = self.passes.score_states(mine, removed, blocks, start)
            for batch, scores in watched.items():
                for (first, last), found in scores.items():
                    yield ((*removed, *range(first, last)), last, batch), found

        gone = {span[-1]: (*removed, *span[:-1]) for span in spans}
        wanted = [(gone[last], last, batch) for batch in self._batches for last in gone]
        self._measure(wanted, share_out, measure, advance)
        return Outcome({last: self._means(gone[last], [last])[last] for last in gone})

    def _score_weights(self, metric: WeightMetric, candidates: Sequence[int], advance: Advance) -> Mapping[int, float]:
        """Score the parameters of each block, in the main process."""

        def compute() -> Mapping[int, float]:
            scores: dict[int, float] = {}
            for block in self.skippable.weights.visit(candidates):
                found = metric.score_block(self.skippable.switches[block].block, block)
                scores[block] = _require_number(metric.name, found)
                advance(self.sequences)
            return scores

        return self.group.from_main(compute)

    @torch.inference_mode()
    def _score_models(
        self, metric: ModelMetric, removed: tuple[int, ...], candidates: Sequence[int], advance: Advance
    ) -> Outcome:
        """Score the model once for each candidate, with it skipped."""
        sequences = torch.cat(tuple(self.passes.batches))

        def measure(mine: Sequence[Name]) -> Iterator[Scores]:
            for gone, block, batch in mine:
                assert block is not None
                self.skippable.skip({*gone, block})
                score = metric.score_model(self.skippable.model, self.tokenizer, sequences)
                yield (gone, block, batch), [_require_number(metric.name, score)]

        wanted = [(removed, block, None) for block in candidates]
        self._measure(wanted, lambda missing: deal(missing, self.group.size), measure, advance)
        return Outcome(self._means(removed, candidates))


def _mean_over_tokens(metric: HiddenStateMetric, entering: Tensor, leaving: Tensor) -> list[float]:
    scores = metric.score_tokens(entering.float(), leaving.float())
    require_shape(metric.name, scores, entering.shape[:-1])
    means: list[float] = as_float64(scores).mean(-1).tolist()
    return means


def _require_number(name: str, score: Any) -> float:
    """Return what a metric returned as a float.

    Raises:
        PluginError: it is not a number.
    """
    if not isinstance(score, int | float):
        raise PluginError(
            f"The metric {name!r} returned {score!r}, which is not a number.",
            hint="Report it to the author of the metric.",
        )
    return float(score)
