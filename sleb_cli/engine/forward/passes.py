"""Calibration sequences in batches, and how they pass through the model without some of its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.forward.fork import Walk, walk_together
from sleb_cli.engine.forward.holding import SharedInputs, Store, keep_on_device
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.predictions import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel, explain_out_of_memory
from sleb_cli.engine.forward.states import BASE, States, depths_to_keep
from sleb_cli.events import Advance, Notice, Notify, no_progress
from sleb_plugins import LogitMetric
from sleb_plugins.errors import OutOfMemory

# At the depths of how many of a step's best candidates branches are kept.
KEPT_DEPTHS = 4


K = TypeVar("K")
T = TypeVar("T")

Job = tuple[int, Sequence[int]]
"""A batch, and the candidates to score on it."""

Listener = Callable[[int, Tensor, Tensor], Iterable[tuple[K, list[float]]]]
"""Takes a block and what enters and leaves it, [sequences, positions, hidden size]; returns scores by key."""


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

    _removed: tuple[int, ...] = field(default=(), init=False)
    _parts: dict[int, list[_MicroBatch]] = field(default_factory=dict, init=False)

    def over(self, sequences: Tensor, loss_mask: Tensor | None) -> Passes:
        """Return passes over other sequences, in batches of the same size, that keep no states."""
        size = self.budget.sequences
        return replace(
            self,
            batches=torch.split(sequences, size),
            loss_mask=None if loss_mask is None else torch.split(loss_mask, size),
            budget=replace(self.budget, kept=0),
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
        left = {batch: list(candidates) or [BASE] for batch, candidates in jobs}

        def run() -> Iterator[tuple[int, int, list[float]]]:
            group = {batch: tuple(blocks) for batch, blocks in left.items() if blocks}
            found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
            if self.forks:
                scored = self._score_by_fork(metric, removed, group, ranking, advance)
            else:
                scored = self._score_one_by_one(metric, removed, group, advance)
            for part, block, scores in scored:
                found[part.batch, block] += scores
                if part.is_last:
                    left[part.batch].remove(block)
                    yield part.batch, block, found[part.batch, block]

        return self._in_smaller_pieces(run)

    def _in_smaller_pieces(self, run: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Yield what `run` does; as often as it runs out of memory, call it again with a smaller budget.

        Raises:
            OutOfMemory: the pieces are as small as they can be.
        """
        while True:
            shape = self.batches[0][: self.budget.sequences].shape
            try:
                with explain_out_of_memory(shape, self.skippable.device):
                    yield from run()
                return
            except OutOfMemory:
                less = self.budget.halved()
                if less is None:
                    raise
                self.budget = less
                self._parts.clear()
            free_memory()  # only here is the error gone, and with it the tensors of its frames
            self.notify(
                Notice(
                    f"Out of memory on {self.skippable.device}; continuing with {less.branches} candidates, "
                    f"{less.sequences} sequences and {less.positions} positions at a time."
                )
            )

    def _together(self, batches: Iterable[int]) -> list[list[_MicroBatch]]:
        """Return the parts of these batches that walk together: all if blocks are streamed, or else each on its own."""
        parts = [part for batch in batches for part in self._parts_of(batch)]
        if self.skippable.weights.resident:
            return [[part] for part in parts]
        return [parts] if parts else []

    def _parts_of(self, batch: int) -> list[_MicroBatch]:
        if batch not in self._parts:
            parts = torch.split(self.batches[batch], self.budget.sequences)
            masks = torch.split(self.loss_mask[batch], self.budget.sequences) if self.loss_mask else [None] * len(parts)
            self._parts[batch] = [
                _MicroBatch(batch, number == len(parts), ids, mask)
                for number, (ids, mask) in enumerate(zip(parts, masks, strict=True), start=1)
            ]
        return self._parts[batch]

    def _score_by_fork(
        self,
        metric: LogitMetric,
        removed: Sequence[int],
        group: Mapping[int, Sequence[int]],
        ranking: Sequence[int],
        advance: Advance,
    ) -> Iterator[tuple[_MicroBatch, int, list[float]]]:
        """Score the parts of batches without each of their candidates, in walks of as many as fit into memory."""

        def depths(part: _MicroBatch, blocks: Sequence[int]) -> dict[int, int]:
            kept = self.budget.kept - (part.dense is not None)
            return depths_to_keep(ranking, [block for block in blocks if block != BASE], kept, KEPT_DEPTHS)

        for together in self._together(group):
            most = self.budget.branches
            for first in range(0, max(len(group[part.batch]) for part in together), most):
                chunk = {part.batch: group[part.batch][first : first + most] for part in together}
                here = [part for part in together if chunk[part.batch]]
                keep = {part: depths(part, chunk[part.batch]) for part in here}
                walks = self._walk(here, removed, chunk, keep, advance, with_dense=metric.needs_dense_logits)
                for part in here:
                    for block in chunk[part.batch]:
                        scores = self._score_final(metric, part, walks[part].branches.pop(block))
                        if not walks[part].block_runs:
                            advance(len(part.ids))
                        yield part, block, scores
                del walks  # before the next ones are made
            for part in together:  # forget what the next step does not need, or has no memory for
                part.states.shrink(self.budget.kept - (part.dense is not None), [*depths(part, group[part.batch])])
                if not self.budget.kept:
                    part.dense = None

    def _walk(
        self,
        parts: Sequence[_MicroBatch],
        removed: Sequence[int],
        group: Mapping[int, Sequence[int]],
        keep: Mapping[_MicroBatch, Mapping[int, int]],
        advance: Advance,
        *,
        with_dense: bool,
    ) -> dict[_MicroBatch, Walk]:
        """Run the walks of these parts to their ends, and the dense model with them where its states are not known."""
        shared = SharedInputs(self.skippable, self.store)
        walks: dict[_MicroBatch, Walk] = {}
        dense: dict[_MicroBatch, Walk] = {}
        for part in parts:
            calls = shared.calls(part.ids)
            candidates = [block for block in group[part.batch] if block != BASE]
            walks[part] = Walk(
                self.skippable, calls, part.states, removed, candidates, keep=keep[part], store=self.store
            )
            if with_dense and part.dense is None:
                dense[part] = Walk(self.skippable, calls, States(), (), (), store=self.store)
        for block in walk_together(self.skippable, [*walks.values(), *dense.values()]):
            for part, walk in walks.items():
                share = walk.ran(block) / max(1, walk.block_runs)
                advance(share * len(group[part.batch]) * len(part.ids))
        for part, walk in dense.items():
            part.dense = walk.branches.pop(BASE)
        return walks

    def _score_final(self, metric: LogitMetric, part: _MicroBatch, hidden: Tensor) -> list[float]:
        """Return each sequence's score from what leaves the last block."""
        predict = partial(Predictions, self.skippable, part.ids)
        dense = predict(part.dense) if metric.needs_dense_logits and part.dense is not None else None
        scores = score_logits(
            metric, predict(hidden), part.ids, dense, loss_mask=part.loss_mask, positions=self.budget.positions
        )
        return scores.tolist()

    def _score_one_by_one(
        self, metric: LogitMetric, removed: Sequence[int], group: Mapping[int, Sequence[int]], advance: Advance
    ) -> Iterator[tuple[_MicroBatch, int, list[float]]]:
        """Score the parts of batches without each of their candidates, by passes of the whole model."""
        for part in (part for batch in group for part in self._parts_of(batch)):
            dense = self.skippable.logits(part.ids, ()) if metric.needs_dense_logits else None
            for block in group[part.batch]:
                logits = self.skippable.logits(part.ids, {*removed, block})
                scores = score_logits(metric, logits, part.ids, dense, loss_mask=part.loss_mask)
                advance(len(part.ids))
                yield part, block, scores.tolist()

    def _drop_outdated(self, removed: tuple[int, ...]) -> None:
        """Drop the kept states that the latest removals change."""
        known = len(self._removed) if removed[: len(self._removed)] == self._removed else None
        for part in (part for parts in self._parts.values() for part in parts):
            if known is None:
                part.states.at.clear()
            for block in removed[known:]:
                part.states.after_removal(block)
        self._removed = removed

    def score_states(
        self,
        batches: Sequence[int],
        removed: Sequence[int],
        candidates: Sequence[int],
        start: Callable[[], Listener[K]],
    ) -> dict[int, dict[K, list[float]]]:
        """Run batches through the model as it stands, and return the scores of each batch's sequences by key.

        A listener is passed each candidate, and what enters and leaves it, and returns scores by keys of its choice.
        `start` makes one for each part of a batch that passes through the model on its own. If memory runs out, batches
        are run again in smaller parts.

        Raises:
            OutOfMemory: the parts are as small as they can be.
        """
        found: dict[int, dict[K, list[float]]] = {}

        def run() -> Iterator[None]:
            scores: defaultdict[int, defaultdict[K, list[float]]] = defaultdict(lambda: defaultdict(list))
            listeners: defaultdict[_MicroBatch, Listener[K]] = defaultdict(start)

            def listen(part: _MicroBatch, block: int, entering: Tensor, leaving: Tensor) -> None:
                if block in candidates:
                    for key, each in listeners[part](block, entering, leaving):
                        scores[part.batch][key] += each

            for together in self._together(batch for batch in batches if batch not in found):
                self._run_as_it_stands(together, removed, candidates[-1], listen)
                found.update({part.batch: scores[part.batch] for part in together if part.is_last})
                listeners.clear()  # which may remember states
                yield

        for _ in self._in_smaller_pieces(run):
            pass
        return found

    def _run_as_it_stands(
        self,
        parts: Sequence[_MicroBatch],
        removed: Sequence[int],
        last: int,
        listen: Callable[[_MicroBatch, int, Tensor, Tensor], None],
    ) -> None:
        """Run parts through the model up to a block, and tell of each block what enters and leaves it."""
        if not self.forks:
            for part in parts:
                self.skippable.run_with_hook(part.ids, removed, partial(listen, part))
            return
        near = self.skippable.device if self.skippable.weights.resident else None
        store = self.store if near is None else lambda hidden: hidden.to(near)
        shared = SharedInputs(self.skippable, self.store)
        calls = [shared.calls(part.ids)[: last + 1] for part in parts]
        walks = [Walk(self.skippable, each, States(), removed, (), store=store) for each in calls]
        entering = [each[0].entering for each in calls]
        for block in walk_together(self.skippable, walks):
            for number, (part, walk) in enumerate(zip(parts, walks, strict=True)):
                listen(part, block, entering[number], walk.branches[BASE])
                entering[number] = walk.branches[BASE]
