"""Calibration sequences in batches, and how they pass through the model without some of its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sleb_cli.engine.forward.fork import Walk, walk_together
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.predictions import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States, depths_to_keep
from sleb_cli.engine.forward.stores import SharedInputs, Store, keep_on_device
from sleb_cli.engine.memory import SmallerPieces
from sleb_cli.events import Advance, Notice, Notify, no_progress
from sleb_plugins import LogitMetric

# Branches are kept at the depths of this many of a step's best candidates.
KEPT_DEPTHS = 4

Job = tuple[int, Sequence[int]]
"""A batch, and the candidates to score on it."""

Span = tuple[int, int]
"""The first and the last of consecutive blocks."""

ScoreStates = Callable[[Tensor, Tensor], list[float]]
"""Takes the states that enter and leave a span, [sequences, positions, hidden size]; returns each
sequence's score.
"""


@dataclass(eq=False)
class _MicroBatch:
    """Sequences of a batch that pass through the model together, and the states that are kept from
    step to step.

    Attributes:
        batch: the number of the batch.
        ids: the tokens, [sequences, positions].
        loss_mask: which of the tokens count as targets; None for all.
        states: hidden states that the next step may begin with.
        dense: hidden states that leave the last block of the dense model, if a metric needs them.
    """

    batch: int
    is_last: bool
    ids: Tensor
    loss_mask: Tensor | None
    states: States = field(default_factory=States)
    dense: Tensor | None = None


_Candidates = Mapping[int, Sequence[int]]
"""The candidates to score on each batch; BASE alone stands for none."""

_Scored = tuple[_MicroBatch, int, list[float]]
"""The scores of a candidate on a micro-batch."""


@dataclass(frozen=True)
class _Step:
    """One step of a search: its metric, the blocks removed so far, the best candidates so far, and
    its progress.
    """

    metric: LogitMetric
    removed: Sequence[int]
    ranking: Sequence[int]
    advance: Advance


@dataclass
class Passes:
    """Calibration sequences in batches on the model's device, and how they pass through the model."""

    skippable: SkippableModel
    batches: Sequence[Tensor]
    budget: MemoryBudget
    notify: Notify
    forks: bool = True
    """Whether candidates share a walk; otherwise each is scored by a pass of the whole model."""
    loss_mask: Sequence[Tensor] | None = None
    """For each batch, which of its tokens count as targets, bool [sequences, positions]; None for
    all.
    """
    store: Store = keep_on_device
    """Where the hidden states of walks wait."""
    first: int = 0
    """The number of the first batch."""
    watch: Callable[[int | None], object] = lambda batch: None
    """Called with the number of a batch before a part of it runs, and with None when unfinished
    batches begin anew.
    """

    _removed: tuple[int, ...] = field(default=(), init=False)
    _micro_batches: dict[int, list[_MicroBatch]] = field(default_factory=dict, init=False)

    @property
    def numbers(self) -> range:
        """The numbers of the batches."""
        return range(self.first, self.first + len(self.batches))

    def over(self, sequences: Tensor, loss_mask: Tensor | None) -> Passes:
        """Return passes over other sequences, in batches of this size that follow these, and keep
        no states.
        """
        size = self.budget.sequences
        return replace(
            self,
            batches=torch.split(sequences, size),
            loss_mask=None if loss_mask is None else torch.split(loss_mask, size),
            budget=replace(self.budget, kept_branches=0),
            first=self.numbers.stop,
        )

    def score(
        self,
        metric: LogitMetric,
        removed: Sequence[int],
        jobs: Sequence[Job],
        ranking: Sequence[int] = (),
        advance: Advance = no_progress,
    ) -> Iterator[tuple[int, int, list[float]]]:
        """Score batches without each of their candidates; yield batch, candidate (BASE without
        any), and scores.

        `ranking` has the best candidates so far, the best first: the next step probably starts at
        one of them. `advance` counts sequences of a candidate, and fractions of one. If memory runs
        out, continue in smaller pieces, and score nothing twice.
        """
        self._drop_outdated(tuple(removed))
        run, step = (
            self._run_walks if self.forks else self._run_whole,
            _Step(metric, removed, ranking, advance),
        )
        unscored = {batch: list(candidates) or [BASE] for batch, candidates in jobs}
        for _ in (pieces := self._smaller_pieces()):
            self.watch(None)
            # Scores of a candidate whose batch was unfinished when memory ran out are dropped, and
            # made again.
            to_score = {batch: tuple(blocks) for batch, blocks in unscored.items() if blocks}
            scores: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
            with pieces:
                for micro, block, micro_scores in run(step, to_score):
                    scores[micro.batch, block] += micro_scores
                    if micro.is_last:
                        unscored[micro.batch].remove(block)
                        yield micro.batch, block, scores[micro.batch, block]

    def _run_walks(self, step: _Step, candidates: _Candidates) -> Iterator[_Scored]:
        for group in self._walk_groups(candidates):
            count, size = max(len(candidates[micro.batch]) for micro in group), self.budget.branches
            for start in range(0, count, size):
                chunk = {
                    micro: some
                    for micro in group
                    if (some := candidates[micro.batch][start : start + size])
                }
                walks, dense = self._start_walks(step, chunk)
                for block in walk_together(self.skippable, [*walks.values(), *dense.values()]):
                    for micro in walks:
                        step.advance(walks[micro].share(block) * len(chunk[micro]) * len(micro.ids))
                for micro in dense:
                    micro.dense = dense[micro].branches.pop(BASE)
                for micro in walks:
                    for block in chunk[micro]:
                        scores = self._score_final(
                            step.metric, micro, walks[micro].branches.pop(block)
                        )
                        if not walks[micro].block_runs:
                            step.advance(len(micro.ids))
                        yield micro, block, scores
                del walks, dense  # before the next ones are made
            for (
                micro
            ) in group:  # drop states that the next step does not need, or has no memory for
                micro.states.shrink(
                    self._branches_to_keep(micro),
                    [*self._depths(step, micro, candidates[micro.batch])],
                )
                micro.dense = micro.dense if self.budget.kept_branches else None

    def _start_walks(
        self, step: _Step, chunk: Mapping[_MicroBatch, Sequence[int]]
    ) -> tuple[dict[_MicroBatch, Walk], dict[_MicroBatch, Walk]]:
        """Return walks of these candidates, and of the dense model where its states are needed and
        unknown.
        """
        shared = SharedInputs(self.skippable, self.store)
        walks: dict[_MicroBatch, Walk] = {}
        dense: dict[_MicroBatch, Walk] = {}
        for micro, blocks in chunk.items():
            watch = partial(self.watch, micro.batch)
            start = partial(
                Walk, self.skippable, shared.calls(micro.ids), store=self.store, watch=watch
            )
            walks[micro] = start(
                micro.states, step.removed, blocks, keep=self._depths(step, micro, blocks)
            )
            if step.metric.needs_dense_logits and micro.dense is None:
                dense[micro] = start(States(), (), ())
        return walks, dense

    def _depths(self, step: _Step, micro: _MicroBatch, blocks: Sequence[int]) -> dict[int, int]:
        return depths_to_keep(step.ranking, blocks, self._branches_to_keep(micro), KEPT_DEPTHS)

    def _branches_to_keep(self, micro: _MicroBatch) -> int:
        return self.budget.kept_branches - (
            micro.dense is not None
        )  # the dense model's states take the room of one

    def _score_final(self, metric: LogitMetric, micro: _MicroBatch, hidden: Tensor) -> list[float]:
        """Return each sequence's score, given the hidden states that leave the last block."""
        predict = partial(Predictions, self.skippable, micro.ids)
        dense = (
            predict(micro.dense) if metric.needs_dense_logits and micro.dense is not None else None
        )
        scores = score_logits(
            metric,
            predict(hidden),
            micro.ids,
            dense,
            loss_mask=micro.loss_mask,
            positions=self.budget.positions,
        )
        return scores.tolist()

    def _run_whole(self, step: _Step, candidates: _Candidates) -> Iterator[_Scored]:
        for micro in (micro for batch in candidates for micro in self._micro_batches_of(batch)):
            self.watch(micro.batch)
            dense = self.skippable.logits(micro.ids, ()) if step.metric.needs_dense_logits else None
            for block in candidates[micro.batch]:
                logits = self.skippable.logits(micro.ids, {*step.removed, block})
                scores = score_logits(
                    step.metric, logits, micro.ids, dense, loss_mask=micro.loss_mask
                )
                step.advance(len(micro.ids))
                yield micro, block, scores.tolist()

    def score_states(
        self,
        batches: Sequence[int],
        removed: Sequence[int],
        candidates: Sequence[int],
        score: ScoreStates,
        longest: int = 1,
    ) -> dict[int, dict[Span, list[float]]]:
        """Run batches through the model as it stands, and return the scores of each batch's
        sequences by span.

        Spans begin and end with a candidate and have up to `longest` blocks; at most so many states
        exist at once. If memory runs out, batches are run again in smaller micro-batches.
        """
        finished: dict[int, dict[Span, list[float]]] = {}
        for _ in (pieces := self._smaller_pieces()):
            scores: defaultdict[int, defaultdict[Span, list[float]]] = defaultdict(
                lambda: defaultdict(list)
            )
            with pieces:
                for group in self._walk_groups(batch for batch in batches if batch not in finished):
                    for micro, span, micro_scores in self._score_spans(
                        group, removed, candidates, score, longest
                    ):
                        scores[micro.batch][span] += micro_scores
                    finished.update(
                        {micro.batch: scores[micro.batch] for micro in group if micro.is_last}
                    )
        return finished

    def _score_spans(
        self,
        micro_batches: Sequence[_MicroBatch],
        removed: Sequence[int],
        candidates: Sequence[int],
        score: ScoreStates,
        longest: int,
    ) -> list[tuple[_MicroBatch, Span, list[float]]]:
        entered = {micro: dict[int, Tensor]() for micro in micro_batches}
        scores = []

        def listen(micro: _MicroBatch, block: int, entering: Tensor, leaving: Tensor) -> None:
            if block in candidates:
                near = {
                    first: state
                    for first, state in entered[micro].items()
                    if block - first < longest
                }
                entered[micro] = near | {block: entering}
                for first, state in entered[micro].items():
                    scores.append((micro, (first, block), score(state, leaving)))

        if not self.forks:
            for micro in micro_batches:
                self.skippable.run_with_hook(micro.ids, removed, partial(listen, micro))
            return scores
        device = self.skippable.device
        store = (
            (lambda hidden: hidden.to(device)) if self.skippable.weights.resident else self.store
        )
        shared = SharedInputs(self.skippable, self.store)
        calls = [shared.calls(micro.ids)[: candidates[-1] + 1] for micro in micro_batches]
        walks = [
            Walk(self.skippable, micro_calls, States(), removed, (), store=store)
            for micro_calls in calls
        ]
        entering = [micro_calls[0].entering for micro_calls in calls]
        for block in walk_together(self.skippable, walks):
            for number, (micro, walk) in enumerate(zip(micro_batches, walks, strict=True)):
                listen(micro, block, entering[number], walk.branches[BASE])
                entering[number] = walk.branches[BASE]
        return scores

    def _smaller_pieces(self) -> SmallerPieces[MemoryBudget]:
        def reduce(budget: MemoryBudget) -> None:
            self.budget = budget
            self._micro_batches.clear()
            self.notify(
                Notice(
                    f"Out of memory on {self.skippable.device}; continuing with {budget.branches} "
                    f"candidates, "
                    f"{budget.sequences} sequences and {budget.positions} positions at a time."
                )
            )

        return SmallerPieces(self.budget, MemoryBudget.halved, reduce)

    def _walk_groups(self, batches: Iterable[int]) -> list[list[_MicroBatch]]:
        micro_batches = [micro for batch in batches for micro in self._micro_batches_of(batch)]
        if self.skippable.weights.resident:
            return [[micro] for micro in micro_batches]
        # All walk through one block after another, so that streamed weights are read once.
        return [micro_batches] if micro_batches else []

    def _micro_batches_of(self, batch: int) -> list[_MicroBatch]:
        if batch not in self._micro_batches:
            index = batch - self.first
            pieces = torch.split(self.batches[index], self.budget.sequences)
            masks = (
                torch.split(self.loss_mask[index], self.budget.sequences)
                if self.loss_mask
                else [None] * len(pieces)
            )
            self._micro_batches[batch] = [
                _MicroBatch(batch, number == len(pieces), ids, mask)
                for number, (ids, mask) in enumerate(zip(pieces, masks, strict=True), start=1)
            ]
        return self._micro_batches[batch]

    def _drop_outdated(self, removed: tuple[int, ...]) -> None:
        known = len(self._removed) if removed[: len(self._removed)] == self._removed else None
        for micro in (
            micro for micro_batches in self._micro_batches.values() for micro in micro_batches
        ):
            if known is None:
                micro.states.at.clear()
            for block in removed[known:]:
                micro.states.after_removal(block)
        self._removed = removed
