"""Calibration sequences in batches, and their passes through the model without some blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.forward.fork import SizesWalk, Walk, walk_together
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.spans import ScoreStates, Span, SpanScores, SpansWalk
from sleb_cli.engine.forward.states import BASE, States, depths_to_keep
from sleb_cli.engine.forward.stores import SharedInputs, Store, keep_on_device
from sleb_cli.engine.memory import SmallerPieces
from sleb_cli.engine.model.padded import PaddedTexts, Tokens, split
from sleb_cli.events import Advance, Notice, Notify, no_progress
from sleb_cli.order import SizeKey
from sleb_plugins import LogitMetric, OutputMetric

# Branches are kept at the depths of this many of a step's best candidates.
KEPT_DEPTHS = 4

Job = tuple[int, Sequence[int]]
"""A batch, and the candidates to score on it."""


@dataclass(eq=False)
class _MicroBatch:
    """Sequences of a batch that pass through the model together, and the states that are kept from
    step to step.

    Attributes:
        batch: the number of the batch.
        is_last: whether it is the last of its batch.
        ids: the tokens, [sequences, positions].
        loss_mask: which of the tokens count as targets; None for all.
        states: hidden states that the next step may begin with.
        dense: what a metric compares with: the hidden states that leave the last block of the dense
            model or, if the model runs whole, its result.
    """

    batch: int
    is_last: bool
    ids: Tokens
    loss_mask: Tensor | None
    states: States = field(default_factory=States)
    dense: Tensor | None = None


C = TypeVar("C", int, SizeKey)
"""A candidate, or a set of blocks."""

_Candidates = Mapping[_MicroBatch, Sequence[C]]
"""The candidates to score on each micro-batch; BASE alone stands for none."""

_Scored = tuple[_MicroBatch, C, list[float]]
"""The scores of a candidate on a micro-batch."""


@dataclass(frozen=True)
class _Chunk(Generic[C]):
    """Candidates that are scored together, and the micro-batches that are finished with them, with
    all of their candidates.
    """

    candidates: _Candidates[C]
    finished: _Candidates[C]


@dataclass(frozen=True)
class _Step:
    """One step of a search: its metric, the blocks removed so far, the best candidates so far, and
    its progress.
    """

    metric: LogitMetric | OutputMetric
    removed: Sequence[int]
    ranking: Sequence[int]
    advance: Advance


@dataclass
class Passes:
    """Calibration sequences in batches on the model's device, and their passes."""

    skippable: SkippableModel
    batches: Sequence[Tokens]
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

    def over(self, sequences: Tokens, loss_mask: Tensor | None) -> Passes:
        """Return passes over other sequences, in batches of this size that follow these, and keep
        no states.
        """
        size = self.budget.sequences
        return replace(
            self,
            batches=split(sequences, size),
            loss_mask=None if loss_mask is None else torch.split(loss_mask, size),
            budget=replace(self.budget, kept_branches=0),
            first=self.numbers.stop,
        )

    def score(
        self,
        metric: LogitMetric | OutputMetric,
        removed: Sequence[int],
        jobs: Sequence[Job],
        ranking: Sequence[int] = (),
        advance: Advance = no_progress,
    ) -> Iterator[tuple[int, int, list[float]]]:
        """Score batches without each of their candidates; yield batch, candidate (BASE without
        any), and scores.

        `ranking` has the best candidates so far, the best first: the next step probably starts at
        one of them. `advance` counts sequences of a candidate, and fractions of one. If memory runs
        out, go on in smaller pieces with what has no scores yet.
        """
        self._drop_outdated(tuple(removed))
        step = _Step(metric, removed, ranking, advance)
        unscored = {batch: list(candidates) or [BASE] for batch, candidates in jobs}
        return self._score_in_pieces(unscored, partial(self._score_chunk, step))

    def score_sizes(
        self,
        metric: LogitMetric | OutputMetric,
        sizes: Mapping[int, Sequence[SizeKey]],
        advance: Advance = no_progress,
    ) -> Iterator[tuple[int, SizeKey, list[float]]]:
        """Score batches without each of their sets of blocks, which share a walk."""
        unscored = {batch: list(of_batch) for batch, of_batch in sizes.items()}
        return self._score_in_pieces(unscored, partial(self._score_sizes, metric, advance))

    def _score_in_pieces(
        self,
        unscored: Mapping[int, list[C]],
        score: Callable[[_Chunk[C]], Sequence[_Scored[C]]],
    ) -> Iterator[tuple[int, C, list[float]]]:
        pieces = self._smaller_pieces()
        for _ in pieces:
            self.watch(None)
            # A batch that was unfinished when memory ran out begins anew.
            scores: defaultdict[tuple[int, C], list[float]] = defaultdict(list)
            with pieces:
                for chunk in self._chunks(unscored):
                    for micro, candidate, micro_scores in score(chunk):
                        scores[micro.batch, candidate] += micro_scores
                        if micro.is_last:
                            unscored[micro.batch].remove(candidate)
                            yield micro.batch, candidate, scores[micro.batch, candidate]

    def _chunks(self, unscored: Mapping[int, Sequence[C]]) -> list[_Chunk[C]]:
        """Divide what is unscored into as many candidates at a time as there is memory for."""
        size = self.budget.branches if self.forks else 1
        chunks = []
        for micro_batches in self._walk_groups([batch for batch in unscored if unscored[batch]]):
            all_candidates = {micro: list(unscored[micro.batch]) for micro in micro_batches}
            count = max(len(candidates) for candidates in all_candidates.values())
            for start in range(0, count, size):
                some = {}
                for micro, candidates in all_candidates.items():
                    if start < len(candidates):
                        some[micro] = candidates[start : start + size]
                is_last = start + size >= count
                chunks.append(_Chunk(some, finished=all_candidates if is_last else {}))
        return chunks

    def _score_chunk(self, step: _Step, chunk: _Chunk[int]) -> list[_Scored[int]]:
        if self.forks:
            scored = self._score_by_walks(step, chunk.candidates)
        else:
            scored = self._score_by_whole_passes(step, chunk.candidates)
        for micro, candidates in chunk.finished.items():
            # Drop what the next step does not need, or has no memory for.
            useful = list(self._depths(step, micro, candidates))
            micro.states.shrink(self._branches_to_keep(micro), useful)
            if not self.forks or self.budget.kept_branches == 0:
                micro.dense = None
        return scored

    def _score_by_walks(self, step: _Step, candidates: _Candidates[int]) -> list[_Scored[int]]:
        shared = SharedInputs(self.skippable, self.store)
        walks: dict[_MicroBatch, Walk] = {}
        dense: dict[_MicroBatch, Walk] = {}
        for micro, blocks in candidates.items():
            calls = shared.calls(micro.ids)
            start = partial(
                Walk,
                self.skippable,
                calls,
                store=self.store,
                watch=partial(self.watch, micro.batch),
            )
            walks[micro] = start(
                step.removed,
                micro.states,
                blocks,
                keep=self._depths(step, micro, blocks),
                progress=step.advance,
                worth=len(blocks) * len(micro.ids),
            )
            if step.metric.needs_dense_logits and micro.dense is None:
                dense[micro] = start((), States(), ())
        walk_together(self.skippable, [*walks.values(), *dense.values()])
        for micro, walk in dense.items():
            micro.dense = walk.branches[BASE]
        scored = []
        for micro, walk in walks.items():
            for block in candidates[micro]:
                scores = self._score_ending(step.metric, micro, walk.branches.pop(block))
                scored.append((micro, block, scores))
        return scored

    def _score_sizes(
        self, metric: LogitMetric | OutputMetric, advance: Advance, chunk: _Chunk[SizeKey]
    ) -> list[_Scored[SizeKey]]:
        shared = SharedInputs(self.skippable, self.store)
        walks: dict[_MicroBatch, SizesWalk] = {}
        for micro, sizes in chunk.candidates.items():
            if metric.needs_dense_logits:
                sizes = [(), *sizes]
            walks[micro] = SizesWalk(self.skippable, shared.calls(micro.ids), sizes, self.store)
        walk_together(self.skippable, list(walks.values()))
        scored = []
        for micro, walk in walks.items():
            micro.dense = walk.branches.get(frozenset())
            for size in chunk.candidates[micro]:
                scores = self._score_ending(metric, micro, walk.branches[frozenset(size)])
                scored.append((micro, size, scores))
                advance(len(micro.ids))
            micro.dense = None
        return scored

    def _score_ending(
        self, metric: LogitMetric | OutputMetric, micro: _MicroBatch, hidden: Tensor
    ) -> list[float]:
        """Return each sequence's score, given the hidden states that leave the last block."""
        ending = self.skippable.ending
        dense = None
        if metric.needs_dense_logits and micro.dense is not None:
            dense = ending.of_states(self.skippable, micro.ids, micro.dense)
        scores = ending.scores(
            metric,
            ending.of_states(self.skippable, micro.ids, hidden),
            micro.ids,
            dense,
            loss_mask=micro.loss_mask,
            positions=self.budget.positions,
        )
        return scores.tolist()

    def _score_by_whole_passes(
        self, step: _Step, candidates: _Candidates[int]
    ) -> list[_Scored[int]]:
        ending = self.skippable.ending
        scored = []
        for micro, blocks in candidates.items():
            self.watch(micro.batch)
            if step.metric.needs_dense_logits and micro.dense is None:
                micro.dense = ending.of_model(self.skippable, micro.ids, ())
            dense = micro.dense if step.metric.needs_dense_logits else None
            for block in blocks:
                result = ending.of_model(self.skippable, micro.ids, {*step.removed, block})
                scores = ending.scores(
                    step.metric, result, micro.ids, dense, loss_mask=micro.loss_mask
                )
                step.advance(len(micro.ids))
                scored.append((micro, block, scores.tolist()))
        return scored

    def _depths(self, step: _Step, micro: _MicroBatch, blocks: Sequence[int]) -> dict[int, int]:
        return depths_to_keep(step.ranking, blocks, self._branches_to_keep(micro), KEPT_DEPTHS)

    def _branches_to_keep(self, micro: _MicroBatch) -> int:
        if micro.dense is None:
            return self.budget.kept_branches
        return self.budget.kept_branches - 1  # the dense model's states take the room of one

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
        pieces = self._smaller_pieces()
        for _ in pieces:
            scores: defaultdict[int, dict[Span, list[float]]] = defaultdict(dict)
            with pieces:
                missing = [batch for batch in batches if batch not in finished]
                for micro_batches in self._walk_groups(missing):
                    spans = []
                    for micro in micro_batches:
                        mask = micro.ids.mask if isinstance(micro.ids, PaddedTexts) else None
                        spans.append(SpanScores(candidates, longest, score, mask))
                    found = self._score_spans(micro_batches, removed, spans)
                    for micro, of_micro in zip(micro_batches, found, strict=True):
                        of_batch = scores[micro.batch]
                        for span, micro_scores in of_micro.items():
                            of_batch[span] = of_batch.get(span, []) + micro_scores
                        if micro.is_last:
                            finished[micro.batch] = of_batch
        return finished

    def _score_spans(
        self,
        micro_batches: Sequence[_MicroBatch],
        removed: Sequence[int],
        spans: Sequence[SpanScores],
    ) -> list[dict[Span, list[float]]]:
        """Run micro-batches through the model as it stands; return the scores of each."""
        if self.forks:
            store = self.store
            if self.skippable.weights.resident:
                store = partial(Tensor.to, device=self.skippable.device)
            shared = SharedInputs(self.skippable, self.store)
            walks = []
            for micro, of_micro in zip(micro_batches, spans, strict=True):
                calls = shared.calls(micro.ids)[: of_micro.candidates[-1] + 1]
                walks.append(SpansWalk(self.skippable, calls, removed, of_micro, store=store))
            walk_together(self.skippable, walks)
        else:
            for micro, of_micro in zip(micro_batches, spans, strict=True):
                self.skippable.run_with_hook(micro.ids, removed, of_micro.add)
        return [of_micro.found for of_micro in spans]

    def _smaller_pieces(self) -> SmallerPieces[MemoryBudget]:
        return SmallerPieces(self.budget, MemoryBudget.halved, self._shrink)

    def _shrink(self, budget: MemoryBudget) -> None:
        self.budget = budget
        for micro_batches in self._micro_batches.values():
            for micro in micro_batches:
                micro.states.at.clear()
                micro.dense = None
        self._micro_batches.clear()
        self.notify(
            Notice(
                f"Out of memory on {self.skippable.device}; continuing with {budget.branches} "
                f"candidates, {budget.sequences} sequences and {budget.positions} positions at a "
                "time."
            )
        )

    def _walk_groups(self, batches: Sequence[int]) -> list[list[_MicroBatch]]:
        """Return the micro-batches of batches, in groups that go through the blocks together."""
        micro_batches = []
        for batch in batches:
            micro_batches += self._micro_batches_of(batch)
        if self.skippable.weights.resident:
            return [[micro] for micro in micro_batches]
        if not micro_batches:
            return []
        # All walk through one block after another, so that streamed weights are read once.
        return [micro_batches]

    def _micro_batches_of(self, batch: int) -> list[_MicroBatch]:
        if batch not in self._micro_batches:
            index = batch - self.first
            size = self.budget.sequences
            count = len(self.batches[index])
            micro_batches = []
            for start in range(0, count, size):
                rows = slice(start, start + size)
                mask = self.loss_mask[index][rows] if self.loss_mask else None
                is_last = start + size >= count
                micro_batches.append(_MicroBatch(batch, is_last, self.batches[index][rows], mask))
            self._micro_batches[batch] = micro_batches
        return self._micro_batches[batch]

    def _drop_outdated(self, removed: tuple[int, ...]) -> None:
        """Drop the kept states that a model without these blocks has not."""
        known = len(self._removed)
        follows = removed[:known] == self._removed
        for micro_batches in self._micro_batches.values():
            for micro in micro_batches:
                if not follows:
                    micro.states.at.clear()
                    continue
                for block in removed[known:]:
                    micro.states.after_removal(block)
        self._removed = removed
