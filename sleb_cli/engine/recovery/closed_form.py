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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import as_float64, dtype_name
from sleb_cli.engine.forward.forecast import announce, block_operations
from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.depth import States
from sleb_cli.engine.recovery.least_squares import Gains, Ridge, best_ridge, ridge_bytes
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    final_norm,
    find_residual_projections,
    possible_projections,
)
from sleb_cli.engine.recovery.unfinished import fit_file, fits_in, read_saved, write_saved
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_cli.units import format_bytes, plural
from sleb_plugins import MachineError, UnsupportedModelError
from sleb_plugins.errors import explain_out_of_memory

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH_TOKENS = 4096
PATIENCE = 3
"""After this many blocks that gain next to nothing, none is refitted until the next gap."""
NEXT_TO_NOTHING = 0.01
"""A fit that lowers the divergence by less than this share of it is kept, but counts as no gain."""
SILENT = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""
ROUNDS = 2
"""How often most blocks are fitted: all projections at once, then those that nothing else in the block reads."""


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
    validation: Calibration,
    notify: Notify,
    *,
    stored: torch.dtype | None = None,
    on_host: bool = False,
    group: ProcessGroup | None = None,
    saved: Path | None = None,
) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states.

    Only the hidden states of one depth are in memory, and of a fit only sums of the size of the fitted weights. If
    blocks are streamed, a fit reads its own block twice, and the blocks behind it once.

    Args:
        skippable: the dense model, as an entered context; its parameters end as they were.
        removed: the removed blocks.
        train: the tokens to fit on, [sequences, positions]; all count, as later ones attend to them.
        validation: the text that decides.
        notify: the listener for events.
        stored: the data type to which values are rounded; None for the model's.
        on_host: whether hidden states stay there until they are needed, because the device has too little.
        group: the processes that share out the text; values do not depend on how many they are.
        saved: the folder where each fit is kept, and found if the run before was interrupted; None keeps none.

    Returns:
        New values by the dense model's parameter names, and a record of every fit.

    Raises:
        UnsupportedModelError: the family's blocks cannot be run one by one.
        MachineError: the sums of a fit do not fit into memory, or not even one sequence at a time does.
    """
    device, group = skippable.device, group or ProcessGroup()
    with torch.inference_mode():
        if reason := why_not_fork(skippable, validation.sequences[:CHECKED_SEQUENCES].to(device)):
            raise UnsupportedModelError(
                f"{skippable.model.config.model_type} cannot be recovered: {reason}.", hint="Leave out --recover."
            )

        def run(batch: int) -> tuple[dict[str, Tensor], ClosedFormRecord]:
            states = States(skippable, frozenset(removed), train, validation, batch, group, on_host=on_host)
            return _Recovery(states, stored or skippable.model.dtype, saved, notify).run()

        def fewer(batch: int) -> None:
            notify(Notice(f"Out of memory on {device}; fitting {batch} sequences at a time."))

        _announce(notify, skippable, removed, train, validation.sequences.numel(), group.size, fits_in(saved))
        batch = max(1, BATCH_TOKENS // train.shape[1])
        # Several processes have the same batches, so one cannot take smaller ones by itself.
        return run(batch) if group.size > 1 else in_smaller_pieces(run, batch, fewer)


@dataclass
class _Recovery:
    states: States
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
            return find_residual_projections(self.skippable, states.probes[0][block], states.pruned[0][states.probed])

    def _fit(self, block: int | None, projections: Sequence[ResidualProjection], found: Mapping[str, Tensor]) -> Fit:
        """Fit projections of a block at once, given the values that were `found` for it.

        Of all ridges, the one that leaves the least error on the validation text is taken.
        """
        values = self.values | dict(found)
        root: nn.Module = self.skippable.model if block is None else self.skippable.switches[block].block
        prefix = f"{self.names[root]}." if self.names[root] else ""
        train, validation = self._sums(block, projections, values)

        def value_of(name: str) -> Tensor:
            return values.get(prefix + name, root.get_parameter(name))

        # A smaller batch would not help.
        with explain_out_of_memory(
            f"Fitting {' and '.join(projection.name for projection in projections)} needs about "
            f"{format_bytes(train.bytes_to_solve)} of memory for its sums.",
            "Leave out --recover, or use a machine or a --device with more memory.",
            MachineError,
        ):
            is_main = self.group.is_main
            solved = best_ridge(train, validation, RIDGES) if is_main else (0.0, 0.0, torch.empty_like(train.xy))
            ridge, after = self.group.from_main(lambda: solved[:2])
            fitted, new = self.group.broadcast(solved[2].contiguous()), dict[str, Tensor]()
            for name, change in _changes(projections, fitted, value_of):
                changed = as_float64(value_of(name)).to(change.device) + change
                place = root.get_parameter(name).device
                new[prefix + name] = self.states.held(changed.to(place, self.stored).contiguous())
        return Fit(ridge, new, float(validation.yy), after)

    def _sums(
        self, block: int | None, projections: Sequence[ResidualProjection], values: Mapping[str, Tensor]
    ) -> tuple[Ridge, Ridge]:
        """Return the sums of the regression over the training and over the validation text."""
        if block is None:
            samples = partial(self.states.samples_of_norm, norm=projections[0])
        else:
            samples = partial(self.states.samples, block=block, projections=projections, values=values)
        device = self.skippable.device if block is None else self.skippable.places[block]
        inputs = sum(projection.inputs for projection in projections)
        outputs = self.skippable.model.config.get_text_config().hidden_size
        has_gains = projections[0].kind == "gain"
        has_bias = any(projection.takes_bias for projection in projections)
        rounded = self.skippable.model.dtype is torch.bfloat16  # so the features are rounded already

        def empty() -> Ridge:
            return Gains(inputs, device) if has_gains else Ridge(inputs + has_bias, outputs, device, rounded=rounded)

        groups = self.states.train_for_gains if has_gains else self.states.train
        train = self.states.sums(samples, groups, empty)
        validation = self.states.sums(samples, self.states.validation, empty)
        self.states.require_finite((*train.tensors, *validation.tensors))
        return train, validation

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
    exact = [projection for projection in projections if projection.exact]
    near = [projection for projection in projections if not projection.exact]
    together = [projection for projection in exact if projection.kind != "gain"] + near
    behind_norms = any(projection.norm for projection in exact)
    rounds = [together] * bool(near) + [exact] * bool(exact) + [exact] * behind_norms
    values: dict[str, Tensor] = {}
    fits: list[Fit] = []
    for fitted in rounds:
        found = fit(fitted, values)
        values, after = values | found.values, found.after
        for norm in (projection.norm for projection in fitted if projection.norm):
            gains = fit([norm], values)
            after = min(gains.before, gains.after)
            if gains.after < gains.before:
                values = values | gains.values
        fits.append(Fit(found.ridge, values, fits[0].before if fits else found.before, after))
    # After the first of several rounds, how the rest of the block responds is not yet known.
    return min(fits[bool(near and exact) :], key=lambda fit: fit.after)


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
    validation_tokens: int,
    processes: int,
    fitted_before: int,
) -> None:
    """Tell how long the fits take at most: they stop where nothing is gained. All are taken to be like the first."""
    count, tokens = len(skippable.switches), train.numel() + validation_tokens
    kept = [block for block in range(count) if block not in removed]
    first = max((block for block in kept if block < min(removed)), default=kept[0])
    refitted = [block for block in kept if block >= first][fitted_before:]
    if not refitted:
        return
    # The dense and the recovered states of each depth, what leaves the dense model, and what each fit runs.
    through_blocks = (count + len(kept) + ROUNDS * len(refitted)) * tokens + count * validation_tokens
    through_blocks += sum(other > block for block in refitted for other in kept) * validation_tokens
    width = skippable.model.config.get_text_config().hidden_size
    sums = len(refitted) * ROUNDS * tokens * 2 * _features(skippable.switches[first].block, width) ** 2
    announce(
        notify,
        f"Recovery: up to {plural(len(refitted), 'block')} fitted to {train.numel():,} tokens in "
        f"{dtype_name(skippable.model.dtype)}",
        through_blocks * block_operations(skippable) + sums,
        skippable,
        train[: max(1, BATCH_TOKENS // train.shape[1])].to(skippable.device),
        at_most=True,
        processes=processes,
    )


def fitting_bytes(block: nn.Module, width: int) -> int:
    """Return about how much memory the fits of a block need besides the model."""
    return ridge_bytes(_features(block, width), width)


def fitted_numbers(block: nn.Module, width: int) -> int:
    """Return how many numbers the fits of a block replace at most."""
    return _features(block, width) * width


def _features(block: nn.Module, width: int) -> int:
    """Return how many inputs are fitted at once: attention's and the MLP's together."""
    return sum(sorted(found.inputs for found in possible_projections(block, width) if found.kind != "gain")[-2:])
