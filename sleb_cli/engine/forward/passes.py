"""Passes of the model without some of its blocks, batch by batch: by the fork, or else one candidate at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import CPU, free_memory
from sleb_cli.engine.forward.engines import CHECKED_SEQUENCES, choose_engine
from sleb_cli.engine.forward.fork import Walk, fork, walk_together
from sleb_cli.engine.forward.holding import Hold, Holding, SharedInputs, in_turns
from sleb_cli.engine.forward.logits import score_hidden_states, score_logits
from sleb_cli.engine.forward.memory_budget import (
    COPIES_OF_LOGITS,
    COPIES_WIDENED,
    Footprint,
    MemoryBudget,
    available_memory,
    resolve_memory_budget,
    settings_for,
    working_bytes,
)
from sleb_cli.engine.forward.saved_walk import SavedWalk
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States, depths_to_keep
from sleb_cli.events import Notice, Notify, SearchAdvanced
from sleb_cli.plan import Engine
from sleb_cli.units import format_bytes
from sleb_plugins import LogitMetric, OutputError, UnsupportedModelError
from sleb_plugins.errors import OutOfMemory, is_out_of_memory

# At the depths of how many of a step's best candidates branches are kept.
KEPT_DEPTHS = 4

# The hidden states that a streamed step holds beside the candidates': what enters the first block, the base where the
# next group starts, the base, and the dense model's.
BESIDE_CANDIDATES = 4

# About what share of a candidate's evaluation the blocks take, and the head does not; only progress depends on it.
BLOCKS_SHARE = 0.7


K = TypeVar("K")

Unit = tuple[int, Sequence[int]]
"""A batch, and the candidates to score on it."""

Listener = Callable[[int, Tensor, Tensor], Iterable[tuple[K, list[float]]]]
"""Takes a block and what enters and leaves it, [sequences, positions, hidden size]; returns scores by key."""


@dataclass(frozen=True)
class _Part:
    """Sequences that pass through the model together, [sequences, positions], and which of their tokens count."""

    key: tuple[int, int]
    ids: Tensor
    loss_mask: Tensor | None


@dataclass
class Passes:
    """Calibration sequences in batches on the model's device, and how they pass through the model."""

    skippable: SkippableModel
    batches: Sequence[Tensor]
    budget: MemoryBudget
    notify: Notify
    engine: Engine = "fork"
    ranking: Sequence[int] = ()
    """The best candidates so far, the best first: the next step probably starts at one of them."""
    loss_mask: Sequence[Tensor] | None = None
    """For each batch, which of its tokens count as targets, bool [sequences, positions]; None for all."""
    available: int = 2**63
    """The bytes that may be taken beside the model."""
    holding: Holding = field(default_factory=Holding)
    """Where the hidden states of streamed walks are held."""
    saved_walk: SavedWalk = field(default_factory=SavedWalk)

    _removed: tuple[int, ...] = ()
    _states: defaultdict[tuple[int, int], States] = field(default_factory=lambda: defaultdict(States))
    _dense: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _shared: SharedInputs = field(default_factory=SharedInputs)

    def over(self, sequences: Tensor, loss_mask: Tensor | None) -> Passes:
        """Return passes over other sequences, in batches of the same size, that keep no states."""
        which = None if loss_mask is None else torch.split(loss_mask, self.budget.sequences)
        batches = torch.split(sequences, self.budget.sequences)
        budget = replace(self.budget, kept=0)
        return Passes(
            self.skippable,
            batches,
            budget,
            self.notify,
            self.engine,
            loss_mask=which,
            available=self.available,
            holding=self.holding,
        )

    def score_units(
        self, metric: LogitMetric, removed: Sequence[int], units: Sequence[Unit]
    ) -> Iterator[tuple[int, int, list[float]]]:
        """Score batches without each of their candidates; yield batch, candidate (BASE without any), and scores.

        If blocks are streamed, the weights of each are read once for all units, or for a group of the candidates if the
        hidden states of all do not fit into memory.

        Raises:
            OutOfMemory: the pieces are as small as they can be.
        """
        if self.skippable.weights.resident:
            for batch, candidates in units:
                for block, scores in self.scores(metric, batch, removed, candidates):
                    yield batch, block, scores
            return
        self._drop_outdated(tuple(removed))
        left = {batch: list(candidates) or [BASE] for batch, candidates in units}
        while any(left.values()):
            with self._smaller_pieces():
                group = {batch: branches[: self.budget.branches] for batch, branches in left.items() if branches}
                missing = [(batch, [b for b in branches if b != BASE]) for batch, branches in group.items()]
                for batch, block, scores in self._score_together(metric, removed, missing):
                    left[batch].remove(block)
                    yield batch, block, scores
            if any(left.values()):
                free_memory()
        for batch, candidates in units:
            depths = depths_to_keep(self.ranking, candidates, self.budget.kept, KEPT_DEPTHS)
            for states in [states for key, states in self._states.items() if key[0] == batch]:
                states.shrink(self.budget.kept, list(depths))

    def scores(
        self, metric: LogitMetric, batch: int, removed: Sequence[int], candidates: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        """Score the sequences of a batch without each candidate; without candidates, in the model as it stands (BASE).

        If the device is out of memory, continue with smaller pieces; nothing is scored twice.

        Raises:
            OutOfMemory: the pieces are as small as they can be.
        """
        self._drop_outdated(tuple(removed))
        left = list(candidates) or [BASE]
        while left:
            with self._smaller_pieces():
                for block, scores in self._scores(
                    metric, batch, removed, [branch for branch in left if branch != BASE]
                ):
                    left.remove(block)
                    yield block, scores
            # Only here is the error gone, and with it the tensors of its frames.
            if left:
                free_memory()

    @contextmanager
    def _smaller_pieces(self) -> Iterator[None]:
        """If the body runs out of memory, end it and take smaller pieces from now on.

        Raises:
            OutOfMemory: the pieces are as small as they can be.
        """
        try:
            yield
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            less = self.budget.halved()
            if not is_out_of_memory(error):
                raise
            if less is None:
                raise self._no_smaller(error) from error
            self._reduce(less)

    def _no_smaller(self, error: Exception) -> OutOfMemory:
        if isinstance(error, OutOfMemory):
            return error
        device, length = self.skippable.device, self.batches[0].shape[1]
        return OutOfMemory(
            f"A sequence of {length} tokens does not fit into the memory of {device}.",
            hint="Use a smaller --sequence-length, a narrower --dtype, or --device cpu.",
        )

    def _reduce(self, less: MemoryBudget) -> None:
        self.budget = less
        self._states.clear()
        self._dense.clear()
        self.notify(
            Notice(
                f"Out of memory on {self.skippable.device}; continuing with {less.branches} candidates, "
                f"{less.sequences} sequences and {less.positions} positions at once."
            )
        )

    def _scores(
        self, metric: LogitMetric, batch: int, removed: Sequence[int], candidates: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        parts = self._parts(batch)
        gathered: defaultdict[int, list[float]] = defaultdict(list)
        for number, part in enumerate(parts):
            score = self._by_fork if self.engine == "fork" else self._one_by_one
            for block, scores in score(metric, part, removed, candidates):
                gathered[block] += scores.tolist()
                if number == len(parts) - 1:
                    yield block, gathered[block]

    def _parts(self, batch: int) -> list[_Part]:
        parts = torch.split(self.batches[batch], self.budget.sequences)
        loss_mask = torch.split(self.loss_mask[batch], self.budget.sequences) if self.loss_mask else [None] * len(parts)
        return [_Part((batch, n), ids, which) for n, (ids, which) in enumerate(zip(parts, loss_mask, strict=True))]

    def _by_fork(
        self, metric: LogitMetric, part: _Part, removed: Sequence[int], candidates: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Score all candidates in one walk, or in several if memory is short."""
        key, ids = part.key, part.ids
        dense = self._dense_hidden_states(key, ids) if metric.needs_dense_logits else None
        states, branches = self._states[key], self.budget.branches
        kept = self.budget.kept - (key in self._dense)
        depths = depths_to_keep(self.ranking, candidates, kept, KEPT_DEPTHS)

        def advanced(done: int, total: int) -> None:
            self.notify(SearchAdvanced(BLOCKS_SHARE * len(ids) * min(branches, len(candidates)) * done / total))

        for block, hidden in fork(
            self.skippable, ids, removed, candidates, states, keep=depths, per_walk=branches, advanced=advanced
        ):
            scores = score_hidden_states(
                metric, self.skippable, hidden, ids, dense, loss_mask=part.loss_mask, positions=self.budget.positions
            )
            yield block, scores
            self.notify(SearchAdvanced((1 - BLOCKS_SHARE) * len(ids) if candidates else 0))
        states.shrink(kept, list(depths))

    def _score_together(
        self, metric: LogitMetric, removed: Sequence[int], units: Sequence[Unit]
    ) -> Iterator[tuple[int, int, list[float]]]:
        """Score all units in one walk with the blocks outermost."""
        parts = [(part, candidates) for batch, candidates in units for part in self._parts(batch)]
        if self.holding.spill_to is not None:
            self._dense.clear()  # a file of its own for each step, which its states would keep open
        model = self.skippable.model
        width = model.config.get_text_config().hidden_size
        shapes = {part.key: (*part.ids.shape, width) for part, _ in parts}
        self.saved_walk.restore(removed, self._states, shapes, {model.dtype, torch.float32})
        wanted = [part for part, _ in parts if metric.needs_dense_logits and part.key not in self._dense]
        hold = self.holding.open(sum(len(candidates) + 3 for _, candidates in parts) + 2 * len(wanted))
        walks = {
            part.key: self._walk(part, removed, candidates, partial(hold, number))
            for number, (part, candidates) in enumerate(parts)
        }
        dense = {
            part.key: self._walk(part, (), (), partial(hold, len(parts) + number), States())
            for number, part in enumerate(wanted)
        }
        evaluations = {part.key: BLOCKS_SHARE * len(part.ids) * len(candidates) for part, candidates in parts}
        passes = {key: max(1, walk.block_branches) for key, walk in walks.items()}
        for block in walk_together(self.skippable, [*walks.values(), *dense.values()]):
            for key, walk in walks.items():
                self.notify(SearchAdvanced(evaluations[key] * walk.ran(block) / passes[key]))
            self._save(block + 1, removed, walks)
        self._dense |= {key: walk.branches.pop(BASE) for key, walk in dense.items()}
        gathered: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        ends = {part.key[0]: part.key for part, _ in parts}
        for part, candidates in parts:
            batch = part.key[0]
            for block in candidates or [BASE]:
                gathered[batch, block] += self._score_final(metric, part, walks[part.key].branches.pop(block)).tolist()
                self.notify(SearchAdvanced((1 - BLOCKS_SHARE) * len(part.ids) if candidates else 0))
                if part.key == ends[batch]:
                    yield batch, block, gathered[batch, block]

    def _save(self, depth: int, removed: Sequence[int], walks: Mapping[tuple[int, int], Walk]) -> None:
        """Save the walks between two blocks; without room for that, the search goes on all the same."""
        try:
            self.saved_walk.save(depth, removed, walks)
        except OutputError as error:
            self.notify(Notice(f"{error.message} A step that is interrupted will start again from its first block."))
            self.saved_walk = SavedWalk()

    def _walk(
        self, part: _Part, removed: Sequence[int], candidates: Sequence[int], hold: Hold, states: States | None = None
    ) -> Walk:
        """Return a walk whose calls hold what all parts share once, and what enters the first block as walks do."""
        calls = self._shared.of(self.skippable.calls(part.ids), hold)
        own = self._states[part.key] if states is None else states
        depths = depths_to_keep(self.ranking, candidates, self.budget.kept, KEPT_DEPTHS)
        return Walk(self.skippable, calls, own, removed, candidates, keep=depths, hold=hold)

    def _score_final(self, metric: LogitMetric, part: _Part, hidden: Tensor) -> Tensor:
        """Return each sequence's score, float64 [batch], from what leaves the last block."""
        device = self.skippable.device
        dense = self._dense[part.key].to(device) if metric.needs_dense_logits else None
        positions, loss_mask = self.budget.positions, part.loss_mask
        return score_hidden_states(
            metric, self.skippable, hidden.to(device), part.ids, dense, loss_mask=loss_mask, positions=positions
        )

    def _one_by_one(
        self, metric: LogitMetric, part: _Part, removed: Sequence[int], candidates: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Score one candidate at a time, each by a pass of the whole model."""
        ids, loss_mask = part.ids, part.loss_mask
        dense = self.skippable.logits(ids, ()) if metric.needs_dense_logits else None
        for block in candidates or [BASE]:
            logits = self.skippable.logits(ids, {*removed, block})
            yield block, score_logits(metric, logits, ids, dense, loss_mask=loss_mask)
            self.notify(SearchAdvanced(len(ids) if candidates else 0))

    def _dense_hidden_states(self, key: tuple[int, int], ids: Tensor) -> Tensor:
        if key in self._dense:
            return self._dense[key]
        _, hidden = next(fork(self.skippable, ids, (), (), States()))
        if self.budget.kept:
            self._dense[key] = hidden
        return hidden

    def _drop_outdated(self, removed: tuple[int, ...]) -> None:
        """Drop the kept states that the latest removals change."""
        known = len(self._removed) if removed[: len(self._removed)] == self._removed else None
        for states in self._states.values():
            if known is None:
                states.at.clear()
            for block in removed[known:]:
                states.after_removal(block)
        self._removed = removed

    def share_of_later_steps(self, candidates: Sequence[int]) -> float:
        """Forecast the time of an evaluation in the next step, as a share of one that starts at the first block.

        The next step starts at the block that leads now, or before any does, at the middle candidate. The head counts
        as the number of blocks that have as many weights.
        """
        if self.engine != "fork" or not self.budget.kept:
            return 1.0
        last, leader = len(self.skippable.switches), (self.ranking or candidates[len(candidates) // 2 :])[0]
        whole = sum(last - candidate for candidate in candidates) + last
        spared = sum(leader - candidate for candidate in candidates if candidate < leader) + leader
        return 1 - spared / (whole + self.skippable.head_blocks * len(candidates))

    def watch(
        self, batch: int, removed: Sequence[int], candidates: Sequence[int], start: Callable[[], Listener[K]]
    ) -> dict[K, list[float]]:
        """Run a batch through the model as it stands, and return the scores of its sequences by key.

        A listener is passed each candidate, and what enters and leaves it, and returns scores by keys of its choice.
        `start` makes one for each part of the batch that passes through the model on its own: if the device is out of
        memory, the batch is run again in smaller parts.

        Raises:
            OutOfMemory: the parts are as small as they can be.
        """
        found: list[dict[K, list[float]]] = []
        while not found:
            with self._smaller_pieces():
                gathered: defaultdict[K, list[float]] = defaultdict(list)
                for part in self._parts(batch):
                    for key, scores in self._watch(part.ids, removed, candidates, start()):
                        gathered[key] += scores
                found.append(gathered)
            if not found:
                free_memory()
        return found[0]

    def watch_together(
        self,
        batches: Sequence[int],
        removed: Sequence[int],
        candidates: Sequence[int],
        start: Callable[[], Listener[K]],
        *,
        remembered: int = 1,
    ) -> dict[int, dict[K, list[float]]]:
        """Watch several batches, and return what `watch` returns for each; streamed weights are read once for all.

        A listener may use what entered the last `remembered` blocks.
        """
        if self.skippable.weights.resident:
            return {batch: self.watch(batch, removed, candidates, start) for batch in batches}
        parts = [part for batch in batches for part in self._parts(batch)]
        places = remembered + 1
        hold, found = (
            self.holding.open(places * len(parts)),
            {batch: defaultdict[K, list[float]](list) for batch in batches},
        )
        walks = [
            self._walk(part, removed, (), in_turns(partial(hold, n), places), States()) for n, part in enumerate(parts)
        ]
        listeners = [start() for _ in parts]
        entering = [walk.calls[0].entering for walk in walks]
        for block in walk_together(self.skippable, walks):
            for n, (part, walk) in enumerate(zip(parts, walks, strict=True)):
                leaving = walk.branches[BASE]
                if block in candidates:
                    for key, scores in listeners[n](block, entering[n], leaving):
                        found[part.key[0]][key] += scores
                entering[n] = leaving
        return {batch: dict(scores) for batch, scores in found.items()}

    def _watch(
        self, ids: Tensor, removed: Sequence[int], candidates: Sequence[int], listen: Listener[K]
    ) -> Iterator[tuple[K, list[float]]]:
        found: list[tuple[K, list[float]]] = []
        if self.engine != "fork":
            self.skippable.watch(
                ids, removed, lambda block, *states: found.extend(listen(block, *states) if block in candidates else ())
            )
            yield from found
            return
        calls = self.skippable.calls(ids)[: candidates[-1] + 1]
        states = self.skippable.run_blocks(calls, calls[0].entering, removed)
        for block, (entering, leaving) in enumerate(pairwise(states)):
            if block in candidates:
                yield from listen(block, entering.to(ids.device), leaving.to(ids.device))

    def in_batches_of(self, size: int) -> Passes:
        """Return passes over the same sequences, this many in a batch, that keep no states."""
        loss_mask = torch.cat(list(self.loss_mask)) if self.loss_mask else None
        return replace(self, budget=replace(self.budget, sequences=size)).over(torch.cat(list(self.batches)), loss_mask)


def prepare_passes(
    skippable: SkippableModel,
    sequences: Tensor,
    notify: Notify,
    *,
    loss_mask: Tensor | None = None,
    memory: str | None = None,
    batch_size: int | None = None,
    min_batches: int = 1,
    checked: int | None = None,
    host_memory: str | None = None,
    spill_to: Path | None = None,
) -> tuple[Passes, str | None]:
    """Fit the passes over these sequences into memory and choose the engine; also return the reason if it is not fork.

    Args:
        skippable: the model.
        sequences: tokens on its device, [sequences, positions].
        notify: the listener for events.
        loss_mask: which tokens count as targets, bool [sequences, positions]; None for all.
        memory: how much memory the user allows beside the model; None takes a share of what is free.
        batch_size: sequences in a batch; None chooses it by the device.
        min_batches: how many batches to make at least, if there are enough sequences.
        checked: on how many tokens of a sequence the engine is checked; None for all.
        host_memory: as `memory`, of the CPU, where hidden states are held if the device has too little.
        spill_to: the folder of a file for hidden states that do not fit into memory, if those of all sequences are held
            while blocks are streamed.

    Raises:
        MachineError: not even one candidate on one sequence fits.
    """
    with torch.inference_mode():
        footprint = _footprint(skippable, sequences[:1, :2])
        available = min(available_memory(device, memory) for device in skippable.devices)
        budget = resolve_memory_budget(
            available,
            footprint,
            settings_for(sequences.device),
            candidates=len(skippable.switches),
            sequences=len(sequences),
            length=sequences.shape[1],
            batch=batch_size,
            min_batches=min_batches,
        )
        engine, reason = _choose_engine(skippable, sequences[: min(CHECKED_SEQUENCES, budget.sequences), :checked])
    if engine != "fork" and batch_size is None:  # all logits of a batch exist together
        fitting = available // 4 // (sequences.shape[1] * footprint.logits)
        budget = replace(budget, sequences=max(1, min(budget.sequences, fitting)))
    batches = torch.split(sequences, budget.sequences)
    which = None if loss_mask is None else torch.split(loss_mask, budget.sequences)
    passes = Passes(skippable, batches, budget, notify, engine, loss_mask=which, available=available)
    if skippable.weights.resident:
        return passes, reason
    if engine != "fork":
        raise UnsupportedModelError(
            f"{skippable.model.config.model_type} cannot be streamed: {reason}.", hint="Use a machine with more memory."
        )
    return passes if spill_to is None else _hold_all(passes, footprint, host_memory or memory, spill_to), reason


def _hold_all(passes: Passes, footprint: Footprint, host_memory: str | None, spill_to: Path) -> Passes:
    """Choose where the hidden states of all sequences and branches are held, and how many are kept between steps.

    If those of all candidates do not fit into memory, a step either goes through the model with a group of them at a
    time, or spills them to a file, whichever moves fewer bytes.
    """
    device, skippable = passes.skippable.device, passes.skippable
    count = len(skippable.switches)
    of_branch = sum(batch.numel() for batch in passes.batches) * footprint.branch
    largest = passes.batches[0].numel()
    room = passes.available - working_bytes(footprint, settings_for(device), largest, passes.budget.positions)
    on_host = device != CPU and room < (count + BESIDE_CANDIDATES) * of_branch
    if on_host:
        room = available_memory(CPU, host_memory)
    branches = max(0, room // of_branch - BESIDE_CANDIDATES)
    kept = max(0, branches - count) // 2
    weights = sum(weight.nbytes for switch in skippable.switches for weight in switch.block.parameters())
    # A group goes through half of the blocks on average; a spilled branch is read and written at each of half of them.
    if branches >= count or (branches and count / branches * weights / 2 < count**2 * of_branch):
        budget = replace(passes.budget, branches=min(branches, count), kept=kept)
        return replace(passes, holding=Holding(on_host=on_host), budget=budget)
    budget = replace(passes.budget, branches=count, kept=0)
    states = format_bytes((count + BESIDE_CANDIDATES) * of_branch)
    place = spill_to.absolute()
    passes.notify(Notice(f"The hidden states of a step take up to {states}; they wait in a file in {place}."))
    return replace(passes, holding=Holding(spill_to, slot_bytes=largest * footprint.branch), budget=budget)


def _width(module: nn.Module) -> int:
    """Return the greatest number of values that a module makes of one; packed weights do not have the shape for it."""
    sizes = [max(weight.shape, default=1) for weight in module.parameters(recurse=False)]
    return max(getattr(module, "in_features", 0), getattr(module, "out_features", 0)) or max(sizes, default=1)


def _choose_engine(skippable: SkippableModel, ids: Tensor) -> tuple[Engine, str | None]:
    """Choose the engine; by a single sequence, if the device has no memory for all of these."""
    try:
        return choose_engine(skippable, ids)
    except OutOfMemory:
        if len(ids) == 1:
            raise
    free_memory()
    return choose_engine(skippable, ids[:1])


def _footprint(skippable: SkippableModel, ids: Tensor) -> Footprint:
    """Measure what a few tokens take; what a block itself needs is estimated from its widest weight."""
    entering = skippable.entering_states(ids, range(1, len(skippable.switches)))
    if not entering:
        raise UnsupportedModelError(
            f"{skippable.model.config.model_type} calls none of its blocks.", hint="Report the family to us."
        )
    hidden = next(iter(entering.values()))
    logits = skippable.logits(ids, range(len(skippable.switches)))
    width = hidden.shape[-1]
    widest = max([width, *(_width(part) for switch in skippable.switches for part in switch.block.modules())])
    return Footprint(
        branch=hidden.nbytes // ids.numel(),
        block=4 * (8 * width + 4 * widest),
        logits=COPIES_OF_LOGITS * logits.shape[-1] * logits.itemsize,
        scored=COPIES_WIDENED * logits.shape[-1] * 4,
    )
