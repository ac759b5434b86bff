"""Calibration sequences in batches, and how they pass through the model without some of its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sleb_cli.engine.forward.fork import Walk, walk_together
from sleb_cli.engine.forward.holding import SharedInputs, Store, keep_on_device
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.predictions import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States, depths_to_keep
from sleb_cli.engine.memory import SmallerPieces
from sleb_cli.events import Advance, Notice, Notify, no_progress
from sleb_plugins import LogitMetric

# At the depths of how many of a step's best candidates branches are kept.
KEPT_DEPTHS = 4


Job = tuple[int, Sequence[int]]
"""A batch, and the candidates to score on it."""

Span = tuple[int, int]
"""The first and the last of consecutive blocks."""

ScoreStates = Callable[[Tensor, Tensor], list[float]]
"""Takes what enters and leaves a span, [sequences, positions, hidden size]; returns the score of each sequence."""


@dataclass(eq=False)
class _MicroBatch:
    """Sequences of a batch that pass through the model together, and what is kept of them from step to step.

    Attributes:
        batch: the number of the batch.
        is_last: whether it is the last of its batch.
        ids: the tokens, [sequences, positions].
        loss_mask: which of them count as targets; None for all.
        states: hidden states that the next step may begin with.
        dense: what leaves the last block of the dense model, if a metric needs it.
    """

    batch: int
    is_last: bool
    ids: Tensor
    loss_mask: Tensor | None
    states: States = field(default_factory=States)
    dense: Tensor | None = None


_Wanted = Mapping[int, Sequence[int]]
"""The candidates to score on each batch; BASE alone stands for none."""

_Scored = tuple[_MicroBatch, int, list[float]]
"""The scores of a candidate on a micro-batch."""


@dataclass(frozen=True)
class _Step:
    """Which metric is scored without which blocks, the best candidates so far, and how progress is told."""

    metric: LogitMetric
    removed: Sequence[int]
    ranking: Sequence[int]
    advance: Advance


@dataclass
class Passes:
    """Calibration sequences in batches on the model's device, and how they pass through the model.

    A walk takes one batch through all blocks. If blocks are streamed, it takes all batches through one block after
    another instead, so that the weights are read once.
    """

    skippable: SkippableModel
    batches: Sequence[Tensor]
    budget: MemoryBudget
    notify: Notify
    forks: bool = True
    """Whether candidates share a walk; otherwise each is scored by a pass of the whole model."""
    loss_mask: Sequence[Tensor] | None = None
    """For each batch, which of its tokens count as targets, bool [sequences, positions]; None for all."""
    store: Store = keep_on_device
    """Where the hidden states of walks wait."""
    first: int = 0
    """The number of the first batch."""
    watch: Callable[[int | None], object] = lambda batch: None
    """Called with the number of a batch before a part of it runs, and with None when unfinished batches begin anew."""

    _removed: tuple[int, ...] = field(default=(), init=False)
    _parts: dict[int, list[_MicroBatch]] = field(default_factory=dict, init=False)

    @property
    def numbers(self) -> range:
        """The numbers of the batches."""
        return range(self.first, self.first + len(self.batches))

    def over(self, sequences: Tensor, loss_mask: Tensor | None) -> Passes:
        """Return passes over other sequences, in batches of the same size that follow these, and keep no states."""
        size = self.budget.sequences
        return replace(
            self,
            batches=torch.split(sequences, size),
            loss_mask=None if loss_mask is None else torch.split(loss_mask, size),
            budget=replace(self.budget, kept=0),
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
        """Score batches without each of their candidates; yield batch, candidate (BASE without any), and scores.

        `ranking` has the best candidates so far, the best first: the next step probably starts at one of them. Progress
        is told in sequences of a candidate, and parts of one.
        If memory runs out, continue in smaller pieces; nothing is scored twice.

        Raises:
            OutOfMemory: the pieces are as small as they can be.
        """
        self._drop_outdated(tuple(removed))
        run, step = self._run_walks if self.forks else self._run_whole, _Step(metric, removed, ranking, advance)
        left = {batch: list(candidates) or [BASE] for batch, candidates in jobs}
        for _ in (pieces := self._smaller_pieces()):
            self.watch(None)
            wanted = {batch: tuple(blocks) for batch, blocks in left.items() if blocks}
            found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
            with pieces:
                for part, block, scores in run(step, wanted):
                    found[part.batch, block] += scores
                    if part.is_last:
                        left[part.batch].remove(block)
                        yield part.batch, block, found[part.batch, block]

    def _run_walks(self, step: _Step, wanted: _Wanted) -> Iterator[_Scored]:
        """Score micro-batches without each of their candidates, in walks of as many as fit into memory."""
        for together in self._together(wanted):
            longest, most = max(len(wanted[part.batch]) for part in together), self.budget.branches
            for at in range(0, longest, most):
                chunk = {part: some for part in together if (some := wanted[part.batch][at : at + most])}
                walks, dense = self._start_walks(step, chunk)
                for block in walk_together(self.skippable, [*walks.values(), *dense.values()]):
                    for part in walks:
                        step.advance(walks[part].share(block) * len(chunk[part]) * len(part.ids))
                for part in dense:
                    part.dense = dense[part].branches.pop(BASE)
                for part in walks:
                    for block in chunk[part]:
                        scores = self._score_final(step.metric, part, walks[part].branches.pop(block))
                        if not walks[part].block_runs:
                            step.advance(len(part.ids))
                        yield part, block, scores
                del walks, dense  # before the next ones are made
            for part in together:  # forget what the next step does not need, or has no memory for
                part.states.shrink(self._kept(part), [*self._depths(step, part, wanted[part.batch])])
                part.dense = part.dense if self.budget.kept else None

    def _start_walks(
        self, step: _Step, chunk: Mapping[_MicroBatch, Sequence[int]]
    ) -> tuple[dict[_MicroBatch, Walk], dict[_MicroBatch, Walk]]:
        """Return walks of these candidates, and of the dense model where its states are needed and unknown."""
        shared = SharedInputs(self.skippable, self.store)
        walks: dict[_MicroBatch, Walk] = {}
        dense: dict[_MicroBatch, Walk] = {}
        for part, blocks in chunk.items():
            watch = partial(self.watch, part.batch)
            start = partial(Walk, self.skippable, shared.calls(part.ids), store=self.store, watch=watch)
            walks[part] = start(part.states, step.removed, blocks, keep=self._depths(step, part, blocks))
            if step.metric.needs_dense_logits and part.dense is None:
                dense[part] = start(States(), (), ())
        return walks, dense

    def _depths(self, step: _Step, part: _MicroBatch, blocks: Sequence[int]) -> dict[int, int]:
        return depths_to_keep(step.ranking, blocks, self._kept(part), KEPT_DEPTHS)

    def _kept(self, part: _MicroBatch) -> int:
        """Return how many branches are kept from step to step, besides the dense model's."""
        return self.budget.kept - (part.dense is not None)

    def _score_final(self, metric: LogitMetric, part: _MicroBatch, hidden: Tensor) -> list[float]:
        """Return each sequence's score from what leaves the last block."""
        predict = partial(Predictions, self.skippable, part.ids)
        dense = predict(part.dense) if metric.needs_dense_logits and part.dense is not None else None
        scores = score_logits(
            metric, predict(hidden), part.ids, dense, loss_mask=part.loss_mask, positions=self.budget.positions
        )
        return scores.tolist()

    def _run_whole(self, step: _Step, wanted: _Wanted) -> Iterator[_Scored]:
        """Score micro-batches without each of their candidates, by passes of the whole model."""
        for part in (part for batch in wanted for part in self._parts_of(batch)):
            self.watch(part.batch)
            dense = self.skippable.logits(part.ids, ()) if step.metric.needs_dense_logits else None
            for block in wanted[part.batch]:
                logits = self.skippable.logits(part.ids, {*step.removed, block})
                scores = score_logits(step.metric, logits, part.ids, dense, loss_mask=part.loss_mask)
                step.advance(len(part.ids))
                yield part, block, scores.tolist()

    def score_states(
        self,
        batches: Sequence[int],
        removed: Sequence[int],
        candidates: Sequence[int],
        score: ScoreStates,
        longest: int = 1,
    ) -> dict[int, dict[Span, list[float]]]:
        """Run batches through the model as it stands, and return the scores of each batch's sequences by span.

        Spans begin and end with a candidate and have up to `longest` blocks, and at most so many states exist at once.
        If memory runs out, batches are run again in smaller parts.

        Raises:
            OutOfMemory: the parts are as small as they can be.
        """
        found: dict[int, dict[Span, list[float]]] = {}
        for _ in (pieces := self._smaller_pieces()):
            scores: defaultdict[int, defaultdict[Span, list[float]]] = defaultdict(lambda: defaultdict(list))
            with pieces:
                for together in self._together(batch for batch in batches if batch not in found):
                    for part, span, each in self._run_as_it_stands(together, removed, candidates, score, longest):
                        scores[part.batch][span] += each
                    found.update({part.batch: scores[part.batch] for part in together if part.is_last})
        return found

    def _run_as_it_stands(
        self,
        parts: Sequence[_MicroBatch],
        removed: Sequence[int],
        candidates: Sequence[int],
        score: ScoreStates,
        longest: int,
    ) -> list[tuple[_MicroBatch, Span, list[float]]]:
        """Run parts through the model up to the last candidate, and return the scores of their spans."""
        entered = {part: dict[int, Tensor]() for part in parts}
        found = []

        def listen(part: _MicroBatch, block: int, entering: Tensor, leaving: Tensor) -> None:
            if block in candidates:
                near = {first: state for first, state in entered[part].items() if block - first < longest}
                entered[part] = near | {block: entering}
                for first, state in entered[part].items():
                    found.append((part, (first, block), score(state, leaving)))

        if not self.forks:
            for part in parts:
                self.skippable.run_with_hook(part.ids, removed, partial(listen, part))
            return found
        device = self.skippable.device
        store = (lambda hidden: hidden.to(device)) if self.skippable.weights.resident else self.store
        shared = SharedInputs(self.skippable, self.store)
        calls = [shared.calls(part.ids)[: candidates[-1] + 1] for part in parts]
        walks = [Walk(self.skippable, each, States(), removed, (), store=store) for each in calls]
        entering = [each[0].entering for each in calls]
        for block in walk_together(self.skippable, walks):
            for number, (part, walk) in enumerate(zip(parts, walks, strict=True)):
                listen(part, block, entering[number], walk.branches[BASE])
                entering[number] = walk.branches[BASE]
        return found

    def _smaller_pieces(self) -> SmallerPieces[MemoryBudget]:
        """Return the budget, and a smaller one as often as memory runs out."""

        def reduce(budget: MemoryBudget) -> None:
            self.budget = budget
            self._parts.clear()
            self.notify(
                Notice(
                    f"Out of memory on {self.skippable.device}; continuing with {budget.branches} candidates, "
                    f"{budget.sequences} sequences and {budget.positions} positions at a time."
                )
            )

        return SmallerPieces(self.budget, MemoryBudget.halved, reduce)

    def _together(self, batches: Iterable[int]) -> list[list[_MicroBatch]]:
        """Return the parts of these batches that walk together: all if blocks are streamed, or else each on its own."""
        parts = [part for batch in batches for part in self._parts_of(batch)]
        if self.skippable.weights.resident:
            return [[part] for part in parts]
        return [parts] if parts else []

    def _parts_of(self, batch: int) -> list[_MicroBatch]:
        if batch not in self._parts:
            index = batch - self.first
            parts = torch.split(self.batches[index], self.budget.sequences)
            masks = torch.split(self.loss_mask[index], self.budget.sequences) if self.loss_mask else [None] * len(parts)
            self._parts[batch] = [
                _MicroBatch(batch, number == len(parts), ids, mask)
                for number, (ids, mask) in enumerate(zip(parts, masks, strict=True), start=1)
            ]
        return self._parts[batch]

    def _drop_outdated(self, removed: tuple[int, ...]) -> None:
        """Drop the kept states that the latest removals change."""
        known = len(self._removed) if removed[: len(self._removed)] == self._removed else None
        for part in (part for parts in self._parts.values() for part in parts):
            if known is None:
                part.states.at.clear()
            for block in removed[known:]:
                part.states.after_removal(block)
        self._removed = removed
