"""Recovery in closed form: kept blocks take over what the removed blocks added to the hidden states.

The dense and the pruned model run side by side, block by block. Behind a gap of removed blocks, the pruned model's
hidden states differ from the dense model's. A ridge regression finds what the last kept block before the gap would have
to add, as a linear map of the input of its last weights, so the map is added to these weights: neither the architecture
nor the cost of inference changes. Then every later block is refitted likewise to the dense hidden states of its depth,
in the model as recovered so far. (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, fits one map for one gap; refitting
every later block, and the weights of positions, are ours.)

Text of its own decides: a fit that does not lower the divergence from the dense model there is not kept. The recovery
is reported on a third text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import CPU, as_float64, dtype_name, in_smaller_pieces, translate_out_of_memory
from sleb_cli.engine.forward.forecast import announce, block_operations
from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.holding import SharedInputs
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.least_squares import Gains, Ridge, best_ridge, ridge_bytes
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    final_norm,
    find_residual_projections,
    passing,
    possible_projections,
)
from sleb_cli.engine.recovery.unfinished import fit_file, fits_in, read_saved, write_saved
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.windows import whole_mask
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_cli.units import format_bytes, plural
from sleb_plugins import MachineError, ModelError, UnsupportedModelError

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH_TOKENS = 4096
GAINS_SHARE = 4
"""Gains, one number for each channel, are fitted to every fourth batch."""
PATIENCE = 3
"""After this many blocks that gain next to nothing, none is refitted until the next gap."""
NEXT_TO_NOTHING = 0.01
"""A fit that lowers the divergence by less than this share of it is kept, but counts as no gain."""
SILENT = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""
VALIDATION_POSITIONS = 2048
"""About how many positions compare two fits."""
PIECE_TOKENS = 64
"""Tokens on which it is found which weights of a block are fitted, to say how long that takes."""
GROUPS = 8
"""A text's batches are summed in this many groups, in order, so that sums do not depend on the number of processes."""

Rows = Iterator[tuple[Tensor, Tensor, Tensor]]
"""The features [rows, features], targets [rows, outputs] and weights [rows] of some positions, batch by batch."""


@dataclass(frozen=True)
class Fit:
    """New values by parameter name, and the weighted squares on the validation text before and after."""

    ridge: float
    values: dict[str, Tensor]
    before: float
    after: float


def recover_in_closed_form(
    skippable: SkippableModel,
    removed: Collection[int],
    train: Tensor,
    validation: Tensor,
    notify: Notify,
    *,
    stored: torch.dtype | None = None,
    in_host_memory: bool = False,
    group: ProcessGroup | None = None,
    saved: Path | None = None,
    loss_mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states.

    Only the hidden states of one depth are in memory, and of a fit only sums of the size of the fitted weights. If
    blocks are streamed, a fit reads its own block twice, and the blocks behind it once.

    Args:
        skippable: the dense model, as an entered context; its parameters end as they were.
        removed: the removed blocks.
        train: the tokens to fit on, [sequences, positions].
        validation: the tokens that decide, [sequences, positions].
        notify: the listener for events.
        stored: the data type to which values are rounded; None for the model's.
        in_host_memory: whether hidden states stay there until they are needed, because the device has too little.
        group: the processes that share out the text; values do not depend on how many they are.
        saved: the folder where each fit is kept, and found if the run before was interrupted; None keeps none.
        loss_mask: which tokens of `validation` count, bool of its shape; None for all. All positions are fitted, as
            later ones attend to them.

    Returns:
        New values by the dense model's parameter names, and a record of every fit.

    Raises:
        UnsupportedModelError: the family's blocks cannot be run one by one.
        MachineError: the sums of a fit do not fit into memory, or not even one sequence at a time does.
    """
    device, group = skippable.device, group or ProcessGroup()
    with torch.inference_mode():
        if reason := why_not_fork(skippable, validation[:CHECKED_SEQUENCES].to(device)):
            raise UnsupportedModelError(
                f"{skippable.model.config.model_type} cannot be recovered: {reason}.", hint="Leave out --recover."
            )

        def run(batch: int) -> tuple[dict[str, Tensor], ClosedFormRecord]:
            states = _States(
                skippable,
                frozenset(removed),
                train,
                validation,
                batch,
                group,
                on_host=in_host_memory,
                loss_mask=loss_mask,
            )
            return _Recovery(states, stored or skippable.model.dtype, saved, notify).run()

        fitted_before = fits_in(saved) if saved else 0
        _announce(notify, skippable, removed, train, validation, group.size, fitted_before)
        batch = max(1, BATCH_TOKENS // validation.shape[1])
        if group.size > 1:  # all have the same batches, so one cannot take smaller ones by itself
            return run(batch)
        return in_smaller_pieces(
            run, batch, lambda batch: notify(Notice(f"Out of memory on {device}; fitting {batch} sequences at a time."))
        )


def _compared_positions(validation: Tensor) -> Tensor:
    """Return the positions of each sequence that compare two fits."""
    length = validation.shape[1]
    return torch.arange(0, length - 1, max(1, len(validation) * (length - 1) // VALIDATION_POSITIONS))


class _States:
    """The hidden states at one depth of the dense and of the recovered model, on this process's batches of the text."""

    def __init__(
        self,
        skippable: SkippableModel,
        removed: frozenset[int],
        train: Tensor,
        validation: Tensor,
        batch: int,
        group: ProcessGroup,
        *,
        on_host: bool,
        loss_mask: Tensor | None,
    ) -> None:
        self.skippable, self.removed, self.group, self.on_host = skippable, removed, group, on_host
        self.count = len(skippable.switches)
        train_ids, self.train = self._take(train, batch)
        validation_ids, self.validation = self._take(validation, batch, len(train_ids))
        self.ids, self.decides = train_ids + validation_ids, slice(len(train_ids), None)
        shared = SharedInputs(skippable, self.held)
        self.calls = [shared.calls(ids) for ids in self.ids]
        self.dense = [calls[0].entering for calls in self.calls]
        self.pruned = self.dense
        self.dense_final = self.leaving(self.calls[self.decides], self.dense[self.decides], range(self.count))
        self.positions = _compared_positions(validation).to(skippable.device)
        counted = whole_mask(validation, loss_mask)
        self.masks, _ = self._take(counted, batch)
        self.compared = max(1, int(counted[:, self.positions.cpu() + 1].sum()))

    def _take(self, text: Tensor, batch: int, begin: int = 0) -> tuple[list[Tensor], list[range]]:
        """Return this process's batches, the first number `begin`, and where each group's are: maybe nowhere."""
        batches, mine, taken = torch.split(text, batch), list[Tensor](), list[range]()
        bounds = [len(batches) * number // GROUPS for number in range(GROUPS + 1)]
        for number, (first, last) in enumerate((a, b) for a, b in pairwise(bounds) if a < b):
            start = begin + len(mine)
            if number % self.group.size == self.group.rank:
                mine += [part.to(self.skippable.device) for part in batches[first:last]]
            taken.append(range(start, begin + len(mine)))
        return mine, taken

    def held(self, tensor: Tensor) -> Tensor:
        """Return a tensor where it stays until it is needed."""
        return tensor.to(CPU) if self.on_host else tensor

    def leaving(
        self, calls: Sequence[list[Call]], entering: Sequence[Tensor], blocks: range, removed: Collection[int] = ()
    ) -> list[Tensor]:
        """Return what leaves the last of these blocks, batch by batch; each block's weights are read once for all."""
        states = list(entering)
        if states:
            for block in self.skippable.weights.visit(block for block in blocks if block not in removed):
                for batch, of_batch in enumerate(calls):
                    states[batch] = self.held(self.skippable.run_block(of_batch[block], states[batch]))
        return states

    @property
    def read_for_gains(self) -> list[int]:
        """The batches that the gains of the final norm are fitted to, and those that decide."""
        fitted = {at for group in self.train for at in group[::GAINS_SHARE]}
        return sorted(fitted | {*range(min(1, len(self.ids))), *range(self.decides.start, len(self.ids))})

    def advance(self, blocks: range, batches: Sequence[int] | None = None) -> None:
        """Let both models' states pass through these blocks, on all batches or only on some."""
        chosen = range(len(self.calls)) if batches is None else batches
        calls, both = [self.calls[at] for at in chosen], ([*self.dense], [*self.pruned])
        left = iter(self.leaving(calls * 2, [states[at] for states in both for at in chosen], blocks))
        for states in both:
            for at in chosen:
                states[at] = next(left)
        self.dense, self.pruned = both

    def require_finite(self, tensors: Iterable[Tensor]) -> None:
        """Make sure that hidden states, or the sums over them, are finite numbers.

        Raises:
            ModelError: some are not.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ModelError(
                "On the text to recover on, the model computes hidden states that are not finite numbers.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or float32.",
            )

    def divergence(self, block: int, values: Mapping[str, Tensor]) -> float:
        """Return the divergence with these values on the validation text, from the pruned states that enter `block`."""
        dense, recovered = Variant(self.skippable), Variant(self.skippable, self.removed, values)
        blocks, here = range(block, self.count), self.decides
        with self.skippable.replaced(values):
            final = self.leaving(self.calls[here], self.pruned[here], blocks, self.removed)
        mine = iter(
            summed_losses(recovered, dense, ours, theirs, ids, self.positions, mask).divergence
            for ours, theirs, ids, mask in zip(final, self.dense_final, self.ids[here], self.masks, strict=True)
        )
        groups = {number: list(islice(mine, len(at))) for number, at in enumerate(self.validation) if at}
        found = sorted(item for of_process in self.group.gather(groups) for item in of_process.items())
        return sum(total for _, totals in found for total in totals) / self.compared

    def rows(
        self,
        batches: Iterable[int],
        block: int,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
    ) -> Rows:
        """Yield features, what is missing at the end of the gap, and weights, in float32.

        Norms divide hidden states by their size before anything reads them, so an error is weighed relative to that
        size: otherwise the few positions whose states are a thousand times larger, often the first, would decide.
        """
        module = self.skippable.switches[block].block
        names = [name for projection in projections for name in projection.names]
        scales = [projection.scale for projection in projections if projection.takes_bias]
        for batch in batches:
            with self.skippable.replaced(values), passing(module, names) as (entering, _):
                found = self.skippable.run_block(self.calls[batch][block], self.pruned[batch]).float()
                wanted = self.dense[batch].to(found.device).float()
                missing = (wanted - found).flatten(0, -2)
                parts = [projection.features(module, entering) for projection in projections]
            ones = [missing.new_full((len(missing), 1), scale) for scale in scales[:1]]
            weights = 1 / wanted.square().mean(-1).flatten().clamp_min(1e-12)
            yield torch.cat([*parts, *ones], dim=1), missing, weights

    def rows_of_norm(self, batches: Iterable[int], norm: ResidualProjection) -> Rows:
        """Yield the same for the final norm, whose output is normalized already, so all positions weigh the same."""
        model, here = self.skippable.model, self.skippable.device
        module = model.get_submodule(norm.name)
        for batch in batches:
            dense, pruned = self.dense[batch].to(here), self.pruned[batch].to(here)
            wanted, found = (module(states).float().flatten(0, -2).to(here) for states in (dense, pruned))
            yield norm.normalized(model, pruned), wanted - found, torch.ones(len(found), device=here)

    def sums(self, rows: Callable[[Iterable[int]], Rows], groups: Sequence[range], empty: Callable[[], Ridge]) -> Ridge:
        """Return the sums over all batches of all processes."""
        total, size, rank = empty(), self.group.size, self.group.rank
        for first in range(0, len(groups), size):
            turn, own = groups[first : first + size], empty()
            for features, targets, weights in rows(turn[rank]) if rank < len(turn) else ():
                own.add(features, targets, weights)
            for source in range(len(turn)):
                part = own if source == rank else empty()
                for sum_, added in zip(total.tensors, part.tensors, strict=True):
                    sum_ += self.group.broadcast(added, source)
        return total


@dataclass
class _Recovery:
    states: _States
    stored: torch.dtype
    saved: Path | None
    notify: Notify

    def __post_init__(self) -> None:
        self.skippable, self.group = self.states.skippable, self.states.group
        self.names = {module: name for name, module in self.skippable.model.named_modules()}
        self.values: dict[str, Tensor] = {}
        self.fits: list[FitRecord] = []

    def run(self) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        states = self.states
        count, removed = states.count, states.removed
        kept = [block for block in range(count) if block not in removed]
        ends = dict(pairwise([*kept, count]))  # where the gap behind a block ends
        with task(self.notify, "Recovering in closed form", count, "blocks") as advance:
            # The block before the first gap; without one, the first that stays makes up for what was before it.
            block = max((block for block in kept if block < min(removed)), default=kept[0])
            begin = block if 0 in kept else 0
            self.divergence, fruitless = states.divergence(0, {}), 0
            states.dense = states.pruned = states.leaving(states.calls, states.dense, range(begin))
            advance(begin)
            while begin < count:
                end = ends[block]
                if (gap := end - begin - 1) or fruitless < PATIENCE:
                    states.dense = states.leaving(states.calls, states.dense, range(begin, end))
                    fruitless = 0 if self._refit(block, gap) or gap else fruitless + 1
                    with self.skippable.replaced(self.values):
                        states.pruned = states.leaving(states.calls, states.pruned, range(block, block + 1))
                else:
                    end = next((each for each in kept if each >= block and ends[each] > each + 1), count)
                    states.advance(range(block, end), None if end < count else states.read_for_gains)
                advance(end - begin, note=f"divergence {self.divergence:.4f}")
                begin = block = end
            self._refit(None)
        return self.values, ClosedFormRecord(fits=tuple(self.fits))

    def _refit(self, block: int | None, gap: int = 0) -> bool:
        """Fit a block's output to the dense states at the end of its gap, or (None) the gains of the final norm.

        Return whether that gained something.
        """
        before = self.divergence
        self.states.require_finite((*self.states.dense, *self.states.pruned))
        if not self._restore(block):
            projections = self.group.from_main(lambda: self._find(block))
            if projections:
                if block is None:
                    here = loaded(self.skippable.model.get_submodule(projections[0].name))
                else:
                    here = self.skippable.loaded(block)
                with here:
                    fit = fit_block(projections, partial(self._fit, block))
                self._keep_if_better(block, gap, projections, fit)
            elif gap:
                self.notify(
                    Notice(
                        f"The gap at block {block} is not recovered: none of its weights write to the residual stream."
                    )
                )
        return self.divergence < before * (1 - NEXT_TO_NOTHING)

    def _find(self, block: int | None) -> list[ResidualProjection]:
        states = self.states
        if block is None:
            norm = final_norm(self.skippable, states.pruned[0].to(self.skippable.device), states.ids[0])
            return [norm] if norm else []
        with self.skippable.loaded(block), self.skippable.replaced(self.values):
            return find_residual_projections(self.skippable, states.calls[0][block], states.pruned[0])

    def _fit(self, block: int | None, projections: Sequence[ResidualProjection], found: Mapping[str, Tensor]) -> Fit:
        """Fit projections of a block at once, given the values that were `found` for it.

        Of all ridges, the one that leaves the least error on the validation text is taken.
        """
        values = self.values | dict(found)
        root: nn.Module = self.skippable.model if block is None else self.skippable.switches[block].block
        if block is None:
            rows = partial(self.states.rows_of_norm, norm=projections[0])
        else:
            rows = partial(self.states.rows, block=block, projections=projections, values=values)
        outputs = self.skippable.model.config.get_text_config().hidden_size
        inputs = sum(projection.inputs for projection in projections)
        has_gains = projections[0].kind == "gain"
        has_bias = any(projection.takes_bias for projection in projections)

        def empty() -> Ridge:
            device = self.skippable.device if block is None else self.skippable.places[block]
            return Gains(inputs, device) if has_gains else Ridge(inputs + has_bias, outputs, device)

        every = GAINS_SHARE if has_gains else 1
        train = self.states.sums(rows, [at[::every] for at in self.states.train], empty)
        validation = self.states.sums(rows, self.states.validation, empty)
        self.states.require_finite((*train.tensors, *validation.tensors))
        prefix, new = f"{self.names[root]}." if self.names[root] else "", dict[str, Tensor]()

        def value_of(name: str) -> Tensor:
            return values.get(prefix + name, root.get_parameter(name))

        # A smaller batch would not help.
        with translate_out_of_memory(
            f"Fitting {' and '.join(projection.name for projection in projections)} needs about "
            f"{format_bytes(train.bytes_to_solve)} of memory for its sums.",
            "Leave out --recover, or use a machine or a --device with more memory.",
            MachineError,
        ):
            is_main = self.group.is_main
            solved = best_ridge(train, validation, RIDGES) if is_main else (0.0, 0.0, torch.empty_like(train.xy))
            ridge, after = self.group.from_main(lambda: solved[:2])
            fitted = self.group.broadcast(solved[2].contiguous())
            for name, change in _changes(projections, fitted, value_of):
                changed = as_float64(value_of(name)).to(change.device) + change
                place = root.get_parameter(name).device
                new[prefix + name] = self.states.held(changed.to(place, self.stored).contiguous())
        return Fit(ridge, new, float(validation.yy), after)

    def _keep_if_better(self, block: int | None, gap: int, projections: Sequence[ResidualProjection], fit: Fit) -> None:
        values = self.values | fit.values
        divergence = self.states.divergence(self.states.count if block is None else block, values)
        if not math.isfinite(divergence):  # float16 overflows with these values
            return
        kept = divergence < self.divergence
        if kept:
            self.values, self.divergence = values, divergence
        record = FitRecord(
            block=block,
            gap=gap,
            weights=tuple(name for projection in projections for name in projection.names),
            exact=all(projection.exact for projection in projections),
            ridge=fit.ridge,
            error_left=fit.after / max(fit.before, 1e-30),
            divergence=divergence,
            kept=kept,
        )
        self.fits.append(record)
        if self.saved and self.group.is_main:
            values = fit.values if kept else {}
            write_saved(fit_file(self.saved, block), record, values)

    def _restore(self, block: int | None) -> bool:
        """Take over the fit of a block (None: of the final norm) from an interrupted run; return whether there is one.

        The values go where weights lie, since fast kernels may round differently at other addresses.
        """
        file = fit_file(self.saved, block) if self.saved else None
        found = self.group.from_main(lambda: read_saved(file, FitRecord) if file and file.exists() else None)
        if found is None:
            return False
        record, tensors = found
        place = self.skippable.device if block is None else self.skippable.places[block]
        self.values = self.values | {
            name: self.states.held(value.to(place, copy=True)) for name, value in tensors.items()
        }
        self.divergence = record.divergence if record.kept else self.divergence
        self.fits.append(record)
        return True


def fit_block(
    projections: Sequence[ResidualProjection], fit: Callable[[Sequence[ResidualProjection], Mapping[str, Tensor]], Fit]
) -> Fit:
    """Fit all projections of a block; `fit` fits some of them at once, given the values found so far.

    Those whose output the rest of the block reads (attention's, which the MLP reads) are fitted with the others, as
    though nothing responded to them: together, so that none adds what another can add better. Then the exact ones
    are fitted once more and make up for the response.

    What is added through a norm for an input x is gain * W x / s, where s is the size of W x, so it is linear in W
    as long as s stays what it is. It does not, and what a fit makes smaller, the norm makes larger again: so the
    gains are fitted after W, which is exact, and then both again with the new s.
    """
    values: dict[str, Tensor] = {}
    fits: list[Fit] = []
    for fitted in fit_rounds(projections):
        found = fit(fitted, values)
        values, after = values | found.values, found.after
        for norm in (projection.norm for projection in fitted if projection.norm):
            gains = fit([norm], values)
            after = min(gains.before, gains.after)
            if gains.after < gains.before:
                values = values | gains.values
        fits.append(Fit(found.ridge, values, fits[0].before if fits else found.before, after))
    # After the first of several rounds, how the rest of the block responds is not yet known.
    both = len({projection.exact for projection in projections}) > 1
    return min(fits[both:], key=lambda fit: fit.after)


def fit_rounds(projections: Sequence[ResidualProjection]) -> list[list[ResidualProjection]]:
    """Return which projections of a block are fitted at once, round by round."""
    exact = [projection for projection in projections if projection.exact]
    near = [projection for projection in projections if not projection.exact]
    together = [projection for projection in exact if projection.kind != "gain"] + near
    behind_norms = any(projection.norm for projection in exact)
    return [together] * bool(near) + [exact] * bool(exact) + [exact] * behind_norms


def _changes(
    projections: Sequence[ResidualProjection], fitted: Tensor, value_of: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what to add to the weights of the projections, by name, and to the bias of the first that has one."""
    start = 0
    for projection in projections:
        part = fitted[start : start + projection.inputs]
        start += len(part)
        if projection.norm:
            multipliers = as_float64(value_of(f"{projection.norm.name}.weight")) + projection.norm.offset
            # Infinity where a norm multiplies by next to nothing.
            silent = multipliers.abs() < SILENT * multipliers.abs().mean()
            part = part / multipliers.masked_fill(silent, torch.inf).to(part.device)
        yield f"{projection.name}.weight", part.T if projection.kind == "matrix" else part
    for projection in [projection for projection in projections if projection.takes_bias][:1]:
        yield f"{projection.name}.bias", fitted[start]


def _announce(
    notify: Notify,
    skippable: SkippableModel,
    removed: Collection[int],
    train: Tensor,
    validation: Tensor,
    processes: int,
    fitted_before: int,
) -> None:
    """Tell how long the fits take at most: they stop where nothing is gained. All are taken to be like the first."""
    count, device, both = len(skippable.switches), skippable.device, train.numel() + validation.numel()
    kept = [block for block in range(count) if block not in removed]
    first = max((block for block in kept if block < min(removed)), default=kept[0])
    refitted = [block for block in kept if block >= first][fitted_before:]
    call = skippable.calls(train[:1, :PIECE_TOKENS].to(device))[first]
    with skippable.loaded(first):
        projections = find_residual_projections(skippable, call, call.entering)
    if not projections or not refitted:
        return
    rounds = fit_rounds(projections)
    inputs = [sum(each.inputs for each in fitted) for fitted in rounds if fitted[0].kind != "gain"]
    gains = sum(each.kind == "gain" or each.norm is not None for fitted in rounds for each in fitted)
    tokens = len(inputs) * both + gains * (train.numel() / GAINS_SHARE + validation.numel())
    # The dense and the recovered states of each depth, what leaves the dense model, and what each fit runs.
    through_blocks: float = (count + len(kept)) * both + count * validation.numel()
    for block in refitted:
        through_blocks += tokens + sum(other > block for other in kept) * validation.numel()
    sums = len(refitted) * sum(both * 2 * features**2 for features in inputs)
    announce(
        notify,
        f"Recovery: up to {plural(len(refitted), 'block')} fitted to {train.numel():,} tokens in "
        f"{dtype_name(skippable.model.dtype)}",
        through_blocks * block_operations(skippable) + sums,
        skippable,
        train[: max(1, BATCH_TOKENS // train.shape[1])].to(device),
        at_most=True,
        processes=processes,
    )


def fitting_bytes(block: nn.Module, width: int) -> int:
    """Return about how much memory the fits of a block need besides the model: attention's and the MLP's together."""
    inputs = sorted(found.inputs for found in possible_projections(block, width) if found.kind != "gain")
    return ridge_bytes(sum(inputs[-2:]), width)
