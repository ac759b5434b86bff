"""Recovery in closed form: kept blocks take over what the removed blocks added to the hidden states.

The dense and the pruned model run side by side, block by block. Behind a gap of removed blocks, the pruned model's
hidden states differ from the dense model's. A ridge regression finds what the last kept block before the gap would have
to add, as a linear map of the input of its last weights, so the map is added to these weights: neither the architecture
nor the cost of inference changes. Then every later block is refitted likewise to the dense hidden states of its depth,
in the model as recovered so far. (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, fits one map for one gap; refitting
every later block, and the weights of positions, are ours.)

Text of its own decides: a fit that does not lower the divergence from the dense model there is not kept. What is
reported is measured on other text again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import CPU, as_float64, in_smaller_pieces, translate_out_of_memory
from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.holding import SharedInputs, SpillFile
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.least_squares import Gains, Ridge, ridge_bytes
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    final_norm,
    find_residual_projections,
    inputs_of,
)
from sleb_cli.engine.recovery.unfinished import SavedFits
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError, UnsupportedModelError

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH_TOKENS = 4096
GAINS_SHARE = 4
"""Gains, one number for each channel, are fitted to one batch in so many."""
PATIENCE = 3
"""After this many blocks that gain next to nothing, none is refitted until the next gap."""
NEXT_TO_NOTHING = 0.01
"""A fit that lowers the divergence by less than this share of it is kept, but counts as no gain."""
SILENT = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""
DECIDING_POSITIONS = 2048
"""On about how many positions fits are compared: enough, since both sides of a comparison see the same."""


_Rows = tuple[Tensor, Tensor, Tensor]
"""The features [rows, features], targets [rows, outputs] and weights [rows] of some positions."""


GROUPS = 8
"""Sums over a text are those over so many groups of its batches, added in order."""

_ELSEWHERE = nn.Identity()
"""Stands for a module where its name is sent to other processes."""


@dataclass(frozen=True)
class _Fit:
    """New values for some parameters of a block, and the weighted squares on the deciding text before and after."""

    ridge: float
    values: dict[str, Tensor]
    before: float
    after: float


def recover_in_closed_form(
    skippable: SkippableModel,
    removed: Collection[int],
    train: Tensor,
    deciding: Tensor,
    notify: Notify,
    *,
    stored: torch.dtype | None = None,
    in_host_memory: bool = False,
    spill_to: Path | None = None,
    group: ProcessGroup | None = None,
    saved: SavedFits | None = None,
) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states.

    Only the hidden states of one depth are in memory, and of a fit only sums of the size of the fitted weights. If
    blocks are streamed, a fit reads its own block twice, and the blocks behind it once, for the divergence that it
    leaves.

    Args:
        skippable: the dense model, as an entered context; its parameters end as they were.
        removed: the removed blocks.
        train: the tokens to fit on, [sequences, positions].
        deciding: the tokens that decide, [sequences, positions].
        notify: the listener for events.
        stored: the data type of the checkpoint, to which values are rounded; None for the model's.
        in_host_memory: whether hidden states stay there until they are needed, because the device has too little.
        spill_to: the folder of files for new values, which may be too many for memory; None holds them there.
        group: the processes that share out the text; values do not depend on how many they are.
        saved: where each fit is kept, and found if the run before was interrupted; None keeps none.

    Returns:
        New values by the dense model's own parameter names, rounded to what is stored, and a record of every fit.

    Raises:
        UnsupportedModelError: the family's blocks cannot be run one by one.
        MachineError: the sums of a fit do not fit into memory, or not even one sequence at a time does.
    """
    device, length = skippable.device, deciding.shape[1]
    place = CPU if in_host_memory else None
    with torch.inference_mode():
        if reason := why_not_fork(skippable, deciding[:CHECKED_SEQUENCES].to(device)):
            raise UnsupportedModelError(
                f"{skippable.model.config.model_type} cannot be recovered: {reason}.", hint="Leave out --recover."
            )
        settings = _Settings(
            frozenset(removed), stored or skippable.model.dtype, place, spill_to, group or ProcessGroup(), saved
        )

        def run(batch: int) -> tuple[dict[str, Tensor], ClosedFormRecord]:
            return _ClosedFormFit(skippable, settings, (train, deciding), batch, notify).run()

        batch = max(1, BATCH_TOKENS // length)
        if settings.group.size > 1:  # all have the same batches, so one cannot take smaller ones by itself
            return run(batch)
        return in_smaller_pieces(
            run,
            batch,
            lambda batch: notify(Notice(f"Out of memory on {device}; fitting with {batch} sequences at once.")),
        )


@dataclass(frozen=True)
class _Settings:
    """What a recovery is told.

    Attributes:
        removed: the removed blocks.
        stored: the data type to which values are rounded.
        place: where hidden states stay until they are needed; None for where they are.
        spill_to: the folder of files for new values; None for memory.
        group: the processes that share out the text.
        saved: where each fit is kept; None for nowhere.
    """

    removed: frozenset[int]
    stored: torch.dtype
    place: torch.device | None
    spill_to: Path | None
    group: ProcessGroup
    saved: SavedFits | None


class _ClosedFormFit:
    def __init__(
        self,
        skippable: SkippableModel,
        settings: _Settings,
        texts: tuple[Tensor, Tensor],
        batch: int,
        notify: Notify,
    ) -> None:
        self.skippable, self.settings, self.notify = skippable, settings, notify
        self.removed, self.group, self.batch = settings.removed, settings.group, batch
        self.count = len(skippable.switches)
        self.shared = SharedInputs()
        self.ids: list[Tensor] = []
        self.train = self._take(texts[0])
        self.held_out = slice(len(self.ids), None)
        self.deciding = self._take(texts[1])
        self.calls = [self._calls(ids) for ids in self.ids]
        # The hidden states of all batches at one depth, in the dense and in the recovered model.
        self.dense = [calls[0].entering for calls in self.calls]
        self.pruned = self.dense
        self.dense_final = self._leaving(self.calls[self.held_out], self.dense[self.held_out], range(self.count))
        self.decides, length = len(texts[1]), texts[1].shape[1]
        step = max(1, self.decides * (length - 1) // DECIDING_POSITIONS)
        self.positions = torch.arange(0, length - 1, step, device=skippable.device)
        self.names = {module: name for name, module in skippable.model.named_modules()}
        self.values: dict[str, Tensor] = {}
        self.fits: list[FitRecord] = []

    def _take(self, text: Tensor) -> list[range | None]:
        """Take this process's groups of batches of a text; return where their batches are, None for those of others."""
        batches = torch.split(text, self.batch)
        taken: list[range | None] = []
        for number, group in enumerate(_groups(len(batches))):
            mine, start = number % self.group.size == self.group.rank, len(self.ids)
            if mine:
                self.ids += [batches[batch].to(self.skippable.device) for batch in group]
            taken.append(range(start, len(self.ids)) if mine else None)
        return taken

    def run(self) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        with task(self.notify, "Recovering in closed form", self.count, "blocks") as advance:
            kept = [block for block in range(self.count) if block not in self.removed]
            # The block before the first gap; without one, the first that stays makes up for what was before it.
            block = max((block for block in kept if block < min(self.removed)), default=kept[0])
            begin = block if 0 in kept else 0
            self.divergence, fruitless = self._divergence(0, {}), 0
            self.dense = self.pruned = self._leaving(self.calls, self.dense, range(begin))
            advance(begin)
            while begin < self.count:
                end = self._end_of_gap(block)
                if (gap := end - begin - 1) or fruitless < PATIENCE:
                    self.dense = self._leaving(self.calls, self.dense, range(begin, end))
                    fruitless = 0 if self._refit(block, end, gap) or gap else fruitless + 1
                    with self.skippable.replaced(self.values):
                        self.pruned = self._leaving(self.calls, self.pruned, range(block, block + 1))
                else:
                    end = self._next_before_gap(block)
                    both = self._leaving(self.calls * 2, self.dense + self.pruned, range(block, end))
                    self.dense, self.pruned = both[: len(self.calls)], both[len(self.calls) :]
                advance(end - begin, note=f"divergence {self.divergence:.4f}")
                begin = block = end
            self._refit_norm()
        return self.values, ClosedFormRecord(fits=tuple(self.fits))

    def _end_of_gap(self, block: int) -> int:
        return next((depth for depth in range(block + 1, self.count) if depth not in self.removed), self.count)

    def _calls(self, ids: Tensor) -> list[Call]:
        calls = self.skippable.calls(ids)
        return self.shared.of(calls, self._held(calls[0].entering))

    def _held(self, tensor: Tensor) -> Tensor:
        """Return a tensor where it stays until it is needed; by default, where it is."""
        return tensor.to(self.settings.place or tensor.device)

    def _next_before_gap(self, block: int) -> int:
        """Return the next block with a removed one behind it, or the number of blocks."""
        return next((depth for depth in range(block, self.count) if self._end_of_gap(depth) > depth + 1), self.count)

    def _leaving(
        self,
        calls: Sequence[list[Call]],
        entering: Sequence[Tensor],
        blocks: range,
        removed: Collection[int] = (),
    ) -> list[Tensor]:
        """Return what leaves the last of these blocks, batch by batch; each block's weights are read once for all."""
        states = list(entering)
        if not states:
            return []
        for block in self.skippable.weights.visit(block for block in blocks if block not in removed):
            for batch, of_batch in enumerate(calls):
                states[batch] = self._held(self.skippable.run_block(of_batch[block], states[batch]))
        return states

    def _divergence(self, block: int, values: Mapping[str, Tensor]) -> float:
        """Return the divergence with these values on the deciding text, from the pruned states that enter `block`."""
        dense, recovered = Variant(self.skippable), Variant(self.skippable, self.removed, values)
        blocks, here = range(block, self.count), self.held_out
        with self.skippable.replaced(values):
            final = self._leaving(self.calls[here], self.pruned[here], blocks, self.removed)
        mine = iter(
            summed_losses(recovered, dense, ours, theirs, ids, self.positions)[1]
            for ours, theirs, ids in zip(final, self.dense_final, self.ids[here], strict=True)
        )
        groups = {number: list(islice(mine, len(at))) for number, at in enumerate(self.deciding) if at is not None}
        found = sorted(item for of_process in self.group.gather(groups) for item in of_process.items())
        return sum(total for _, totals in found for total in totals) / (len(self.positions) * self.decides)

    def _refit(self, block: int, end: int, gap: int) -> bool:
        """Fit a block's output to the dense states at `end`; return whether that gained something."""
        before = self.divergence
        if self._restore(block):
            return self.divergence < before * (1 - NEXT_TO_NOTHING)
        projections = self._projections(block)
        if not projections:
            if gap:
                self.notify(
                    Notice(f"The gap at block {block} is not recovered: none of its weights add to its output.")
                )
            return False
        with self.skippable.loaded(block):
            fit = self._fit_block(block, projections)
        self._keep_if_better(block, gap, projections, fit)
        return self.divergence < before * (1 - NEXT_TO_NOTHING)

    def _fit_block(self, block: int, projections: Sequence[ResidualProjection]) -> _Fit:
        """Fit all projections of a block.

        Those whose output the rest of the block reads (attention's, which the MLP reads) are fitted with the others, as
        though nothing responded to them: together, so that none adds what another can add better. Then the exact ones
        are fitted once more and make up for the response.

        What is added through a norm for an input x is gain * W x / s, where s is the size of W x, so it is linear in W
        as long as s stays what it is. It does not, and what a fit makes smaller, the norm makes larger again: so the
        gains are fitted after W, which is exact, and then both again with the new s.
        """
        exact = [projection for projection in projections if projection.exact]
        near = [projection for projection in projections if not projection.exact]
        together = [projection for projection in exact if projection.kind != "gain"] + near
        rounds = [together] * bool(near) + [exact] * bool(exact)
        if any(projection.norm for projection in exact):
            rounds.append(exact)
        values: dict[str, Tensor] = {}
        best: _Fit | None = None
        before: float | None = None
        for fitted in rounds:
            fit = self._fit(block, fitted, values)
            before, after = fit.before if before is None else before, fit.after
            values = values | fit.values
            for norm in (projection.norm for projection in fitted if projection.norm):
                gains = self._fit(block, [norm], values)
                after = min(gains.before, gains.after)
                if gains.after < gains.before:
                    values = values | gains.values
            if fitted is together and exact:
                continue  # how the rest of the block responds is not yet known
            if best is None or after < best.after:
                best = _Fit(fit.ridge, values, before, after)
        assert best is not None
        return best

    def _fit(self, block: int, projections: Sequence[ResidualProjection], found: dict[str, Tensor]) -> _Fit:
        """Fit projections of a block at once, with the values that were `found` beside those of other blocks."""
        values = self.values | found
        rows = partial(self._rows, block=block, projections=projections, values=values)
        return self._best_fit(rows, projections, values)

    def _projections(self, block: int) -> list[ResidualProjection]:
        """Return the block's residual projections, which the main process finds."""

        def find() -> list[ResidualProjection]:
            with self.skippable.loaded(block), self.skippable.replaced(self.values):
                found = find_residual_projections(self.skippable, self.calls[0][block], self.pruned[0])
            return [_in_modules(projection, lambda name: _ELSEWHERE) for projection in found]

        module = self.skippable.switches[block].block
        return [_in_modules(projection, module.get_submodule) for projection in self.group.from_main(find)]

    def _refit_norm(self) -> None:
        """Refit the gains of the final norm, and so the scale of the logits, to the dense model's states there."""
        if self._restore(None):
            return

        def find() -> ResidualProjection | None:
            norm = final_norm(self.skippable, self.pruned[0].to(self.skippable.device), self.ids[0])
            return _in_modules(norm, lambda name: _ELSEWHERE) if norm else None

        found = self.group.from_main(find)
        if found is not None:
            norm = _in_modules(found, self.skippable.model.get_submodule)
            rows = partial(self._rows_of_norm, norm=norm)
            with loaded(norm.module):
                self._keep_if_better(None, 0, [norm], self._best_fit(rows, [norm], self.values))

    def _keep_if_better(
        self, block: int | None, gap: int, projections: Sequence[ResidualProjection], fit: _Fit
    ) -> None:
        values = self.values | fit.values
        divergence = self._divergence(self.count if block is None else block, values)
        kept = divergence < self.divergence
        if kept:
            self.values, self.divergence = values, divergence
        record = FitRecord(
            block=block,
            gap=gap,
            weights=tuple(p.name for projection in projections for p in (projection, projection.norm) if p),
            exact=all(projection.exact for projection in projections),
            ridge=fit.ridge,
            error_left=fit.after / max(fit.before, 1e-30),
            divergence=divergence,
            kept=kept,
        )
        self.fits.append(record)
        if self.settings.saved is not None and self.group.is_main:
            self.settings.saved.write(record, fit.values if kept else {})

    def _restore(self, block: int | None) -> bool:
        """Take over the fit of a block (None: of the final norm) from an interrupted run; return whether there is one.

        The values go where weights lie, since fast kernels may round differently at other addresses.
        """
        saved = self.settings.saved
        found = self.group.from_main(lambda: saved.read(block) if saved is not None else None)
        if found is None:
            return False
        record, values = found
        place = self.skippable.device if block is None else self.skippable.places[block]
        self.values = self.values | {name: self._kept(value.to(place, copy=True)) for name, value in values.items()}
        self.divergence = record.divergence if record.kept else self.divergence
        self.fits.append(record)
        return True

    def _best_fit(
        self,
        rows: Callable[[Sequence[int]], Iterator[_Rows]],
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
    ) -> _Fit:
        """Change `values` by the fit whose ridge leaves the least error on the deciding text."""
        every = GAINS_SHARE if projections[0].kind == "gain" else 1
        fitted_on = [at and at[::every] for at in self.train]
        train, deciding = (self._sums(rows, groups, projections) for groups in (fitted_on, self.deciding))
        changes: dict[str, Tensor] = {}

        def solve() -> tuple[float, float, float]:
            assert train is not None
            assert deciding is not None
            with _enough_for_sums(" and ".join(projection.name for projection in projections), train):
                error, ridge, fitted = _best(train, deciding)
                changes.update(self._new_values(projections, fitted, values))
            return ridge, deciding.yy, error

        ridge, before, after = self.group.from_main(solve)
        return _Fit(ridge, dict(self._from_main(projections, changes)), before, after)

    def _sums(
        self,
        rows: Callable[[Sequence[int]], Iterator[_Rows]],
        groups: Sequence[range | None],
        projections: Sequence[ResidualProjection],
    ) -> Gains | Ridge | None:
        """Return the sums over all batches, in the main process; the others have none.

        Sums of groups are added in the order of the groups, so they do not depend on the number of processes.
        """
        total: Gains | Ridge | None = None
        for first in range(0, len(groups), self.group.size):
            turn = groups[first : first + self.group.size]
            own = turn[self.group.rank] if self.group.rank < len(turn) else None
            part = None if own is None else _sums(rows(own), projections)
            if total is None:
                total = part if self.group.is_main else None
            elif part is not None:
                total.add_sums(*part.tensors)
            for source in range(1, len(turn)):
                sent = part.tensors if part is not None and source == self.group.rank else self._empty_sums(projections)
                received = [self.group.broadcast(tensor, source) for tensor in sent]
                if total is not None:
                    total.add_sums(*received)
        return total

    def _empty_sums(self, projections: Sequence[ResidualProjection]) -> list[Tensor]:
        """Return room for the sums of another process."""
        inputs = sum(map(_inputs, projections)) + any(projection.takes_bias for projection in projections)
        outputs = self.skippable.model.config.get_text_config().hidden_size
        shapes = [[inputs], [inputs]] if projections[0].kind == "gain" else [[inputs, inputs], [inputs, outputs]]
        place = as_float64(torch.empty(0, device=self.skippable.device)).device
        sums = [torch.empty(shape, dtype=torch.float64, device=place) for shape in shapes]
        return [*sums, torch.empty(1, dtype=torch.float64)]

    def _from_main(
        self, projections: Sequence[ResidualProjection], changes: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the new values that the main process has, by name."""
        for module, which in _fitted_parameters(projections):
            name, own = f"{self.names[module]}.{which}", module.get_parameter(which)
            value = changes[name] if self.group.is_main else torch.empty_like(own, dtype=self.settings.stored)
            yield name, self._kept(self.group.broadcast(value))

    def _kept(self, value: Tensor) -> Tensor:
        """Return a new value where it stays until the end."""
        folder = self.settings.spill_to
        return self._held(value) if folder is None else SpillFile(folder, 1, value.nbytes).hold(0, value)

    def _batches(self, which: Sequence[int]) -> Iterator[tuple[list[Call], Tensor, Tensor]]:
        return ((self.calls[batch], self.dense[batch], self.pruned[batch]) for batch in which)

    def _rows(
        self,
        batches: Sequence[int],
        block: int,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
    ) -> Iterator[_Rows]:
        """Yield features, what is missing at the end of the gap, and weights, batch by batch, in float32.

        Norms divide hidden states by their size before anything reads them, so an error is weighed relative to that
        size: otherwise the few positions whose states are a thousand times larger, often the first, would decide.
        """
        modules = [module for projection in projections for module in projection.modules]
        for calls, dense, pruned in self._batches(batches):
            with self.skippable.replaced(values), inputs_of(modules) as entering:
                found = self.skippable.run_block(calls[block], pruned).float()
                wanted = dense.to(found.device).float()
                missing = (wanted - found).flatten(0, -2)
                parts = [projection.features(entering) for projection in projections]
            ones = [
                missing.new_full((len(missing), 1), projection.scale)
                for projection in projections
                if projection.takes_bias
            ]
            weights = 1 / wanted.square().mean(-1).flatten().clamp_min(1e-12)
            yield torch.cat([*parts, *ones[:1]], dim=1), missing, weights

    def _rows_of_norm(self, batches: Sequence[int], norm: ResidualProjection) -> Iterator[_Rows]:
        """Yield the same for the final norm, whose output is normalized already, so all positions weigh the same."""
        for _, dense, pruned in self._batches(batches):
            here = self.skippable.device
            wanted, found = (norm.module(states.to(here)).float().flatten(0, -2) for states in (dense, pruned))
            features = norm.normalized(pruned.to(found.device))
            yield features, wanted - found, torch.ones(len(found), device=found.device)

    def _new_values(
        self, projections: Sequence[ResidualProjection], fitted: Tensor, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the new weights of the projections, by name, and the new bias of the first that has one."""
        start = 0
        for projection in projections:
            part = fitted[start : start + _inputs(projection)]
            start += len(part)
            if projection.norm:
                part = part / self._multipliers(projection.norm, values).to(part.device)
            yield self._changed(values, projection.module, "weight", part.T if projection.kind == "matrix" else part)
        for module, which in _fitted_parameters(projections)[len(projections) :]:
            yield self._changed(values, module, which, fitted[start])

    def _multipliers(self, norm: ResidualProjection, values: Mapping[str, Tensor]) -> Tensor:
        """Return what each channel is multiplied by behind the norm; infinity where that is next to nothing."""
        weight = values.get(f"{self.names[norm.module]}.weight", norm.module.get_parameter("weight"))
        multipliers = as_float64(weight) + norm.offset
        return multipliers.masked_fill(multipliers.abs() < SILENT * multipliers.abs().mean(), torch.inf)

    def _changed(
        self, values: Mapping[str, Tensor], module: nn.Module, which: str, change: Tensor
    ) -> tuple[str, Tensor]:
        name, parameter = f"{self.names[module]}.{which}", module.get_parameter(which)
        changed = as_float64(values.get(name, parameter)).to(change.device) + change
        return name, changed.to(parameter.device, self.settings.stored).contiguous()


def _groups(count: int) -> list[range]:
    """Cut so many batches into groups, in order."""
    bounds = [count * number // GROUPS for number in range(GROUPS + 1)]
    return [range(start, end) for start, end in pairwise(bounds) if start < end]


def _in_modules(projection: ResidualProjection, module_of: Callable[[str], nn.Module]) -> ResidualProjection:
    """Return the projection, and the norm behind it, with the modules of these names."""
    norm = _in_modules(projection.norm, module_of) if projection.norm else None
    return replace(projection, module=module_of(projection.name), norm=norm)


def _inputs(projection: ResidualProjection) -> int:
    """Return how many coefficients of the fit are a projection's."""
    return projection.module.get_parameter("weight").shape[1 if projection.kind == "matrix" else 0]


def _fitted_parameters(projections: Sequence[ResidualProjection]) -> list[tuple[nn.Module, str]]:
    """Return which parameters are fitted, in the order of the coefficients: weights, and the first bias, if any."""
    with_bias = [projection.module for projection in projections if projection.takes_bias]
    return [
        *((projection.module, "weight") for projection in projections),
        *((first, "bias") for first in with_bias[:1]),
    ]


def _best(train: Gains | Ridge, deciding: Gains | Ridge) -> tuple[float, float, Tensor]:
    """Return the least error on the deciding text, its ridge, and the coefficients.

    The error has one minimum, so ridges are tried from the middle on, towards less error.
    """
    middle = len(RIDGES) // 2
    best = _tried(train, deciding, RIDGES[middle])
    for ridges in (RIDGES[middle + 1 :], RIDGES[:middle][::-1]):
        for ridge in ridges:  # one after the other, since coefficients are as large as the weights in float64
            tried = _tried(train, deciding, ridge)
            if tried[0] >= best[0]:
                break
            best = tried
        if best[1] != RIDGES[middle]:
            break
    return best


def _tried(train: Gains | Ridge, deciding: Gains | Ridge, ridge: float) -> tuple[float, float, Tensor]:
    """Return the error on the deciding text with this ridge, the ridge, and the coefficients."""
    fitted = train.solve(ridge)
    return deciding.error(fitted), ridge, fitted


def _enough_for_sums(names: str, sums: Gains | Ridge) -> AbstractContextManager[None]:
    """Say what a fit needs if there is no memory for it; a smaller batch would not help."""
    return translate_out_of_memory(
        f"The fit of {names} needs about {format_bytes(sums.bytes_to_solve)} of memory for its sums.",
        "Leave out --recover, or use a machine or a --device with more memory.",
        MachineError,
    )


def fitting_bytes(block: nn.Module, width: int) -> int:
    """Return about how much memory the fits of a block need beside the model: attention's and the MLP's, together."""
    inputs = sorted(m.in_features for m in block.modules() if isinstance(m, nn.Linear) and m.out_features == width)
    return ridge_bytes(sum(inputs[-2:]), width)


def _sums(rows: Iterator[_Rows], projections: Sequence[ResidualProjection]) -> Gains | Ridge:
    sums = Gains() if projections[0].kind == "gain" else Ridge()
    for features, targets, weights in rows:
        sums.add(features, targets, weights)
    return sums
