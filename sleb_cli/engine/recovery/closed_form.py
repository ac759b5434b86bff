"""Recovery in closed form: kept blocks take over what removed blocks added to hidden states.

The dense and the pruned model run side by side, block by block. Behind a gap of removed blocks, the
pruned model's hidden states differ from the dense model's. A ridge regression finds what the last
kept block before the gap would have to add, as a linear map of the input of its last weights, so
the map is added to these weights: neither the architecture nor the cost of inference changes. Then
every later block is refitted likewise to the dense hidden states of its depth, in the model as
recovered so far. (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, fits one map for one gap;
refitting every later block, and the weights of positions, are ours.)

Text of its own decides: a fit that does not lower the divergence from the dense model there is not
kept. The recovery is reported on a third text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.memory_needs import states_bytes
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.block_regression import BlockRegression, fit_in_rounds
from sleb_cli.engine.recovery.depth import Batches, DepthPair, Judge, require_finite
from sleb_cli.engine.recovery.least_squares import ridge_bytes
from sleb_cli.engine.recovery.residual_projections import possible_matrices
from sleb_cli.engine.recovery.stage import HIDDEN_STATES, Job, Stage, kept_blocks
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, task
from sleb_cli.plan import ClosedFormRecord, FitRecord, LossesRecord
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError

FIT_TASK = "Recovering in closed form"
BATCH_TOKENS = 4096
PATIENCE = 3
"""After this many blocks in a row that gain next to nothing, no more are refitted until the next
gap.
"""
MIN_GAIN = 0.01
"""A fit that lowers the divergence by less than this share of it is kept, but counts as no gain."""
ROUNDS_BEHIND = 1
"""How often a later block is fitted: a second round gains nothing there."""
_SAVED = "closed form"
"""The name of this stage in the saved state."""


class SavedFits(BaseModel, strict=True, extra="forbid"):
    """The fits so far; `complete` if there are no more."""

    fits: tuple[FitRecord, ...] = ()
    complete: bool = False


@dataclass(frozen=True)
class ClosedForm(Stage):
    """The recovery in closed form, always the first stage: it starts from the dense values."""

    title = "Recovery"
    task = FIT_TASK
    model = "recovered"
    key = "closed_form"
    streams = True

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of hidden states, and of the sums of the largest fit."""
        width = surgery.architecture.text_config.hidden_size
        states = states_bytes(surgery.architecture, dtype, tokens)
        features = max(_fitted_features(block, width) for block in kept_blocks(surgery))
        # Entering the model, entering a block in both models, and leaving it.
        return {HIDDEN_STATES: 4 * states, "regression sums": ridge_bytes(features, width)}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of all fits at most."""
        width: int = surgery.architecture.text_config.hidden_size
        before_gap = max(0, min(surgery.removed) - 1)
        fitted = kept_blocks(surgery)[before_gap:]
        features = sum(_fitted_features(block, width) for block in fitted)
        return features * width * stored.itemsize

    def run(
        self, job: Job, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        """Fit in closed form, or take over the fits of an interrupted run, which may be all."""
        assert not values
        if saved_fits := job.state.find(_SAVED, SavedFits):
            saved, tensors = saved_fits
            count = plural(len(saved.fits), "fit")
            job.notify(Notice(f"Continuing with {count} of an interrupted run."))
            if saved.complete:
                new_values = {name.partition("/")[2]: value for name, value in tensors.items()}
                return new_values, ClosedFormRecord(fits=saved.fits)
        return recover_in_closed_form(job)

    def fields(self, done: ClosedFormRecord, losses: LossesRecord) -> dict[str, Any]:
        """Return the fits, and the losses with them."""
        return {"closed_form": done, "closed_form_losses": losses}


def recover_in_closed_form(job: Job) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states; return new values by parameter.

    Memory holds the hidden states of one depth, and sums of the size of the fitted weights. If
    blocks are streamed, a fit reads its own block twice, and the blocks behind it once. All tokens
    of the text count, as later ones attend to them.
    """
    dense = job.dense
    with torch.inference_mode():
        sequences = job.validation.sequences[:CHECKED_SEQUENCES].to(dense.device)
        if reason := why_not_fork(dense, sequences):
            raise UnsupportedModelError(
                f"{dense.model.config.model_type} cannot be recovered: {reason}.",
                hint="Leave out --recover.",
            )
        size = max(1, BATCH_TOKENS // job.train.sequences.shape[1])
        fit_all = partial(_fit_all_blocks, job)
        fitted = in_smaller_pieces(fit_all, size, dense.device, job.notify, "fitting {} sequences")
    return fitted.values, ClosedFormRecord(fits=tuple(fitted.records))


def _fit_all_blocks(job: Job, size: int) -> FittedBlocks:
    count = len(job.dense.switches)
    removed = job.settings.surgery.removed
    kept_blocks = [block for block in range(count) if block not in removed]
    ends = dict(pairwise([*kept_blocks, count]))  # where the gap behind a block ends
    # The block before the first gap; without one, the first that stays makes up for what was
    # before it.
    block = kept_blocks[0]
    begin = 0
    if 0 not in removed:
        block = min(removed) - 1
        begin = block
    fruitless = 0
    with task(job.notify, FIT_TASK, count, "blocks") as advance:
        batches = Batches(job, size)
        fitted = FittedBlocks(job, batches, Judge(job, batches, size))
        entering = batches.run(batches.entering(), range(begin))
        pair = DepthPair(entering, entering)
        advance(begin)
        while begin < count:
            end = ends[block]
            gap = end - begin - 1
            if gap == 0 and fruitless >= PATIENCE:
                # Nothing is gained here, so both models run on to the next gap.
                end = _block_before_next_gap(block, ends, count)
                chosen = batches.final_norm_needs if end == count else None
                pair = batches.run_both(pair, range(block, end), chosen)
            else:
                # While the block is fitted, the dense model is behind the gap, and the pruned one
                # before it.
                dense = batches.run(pair.dense, range(begin, end))
                pair = DepthPair(dense, pair.pruned)
                has_gained = fitted.refit(pair, block, gap)
                if has_gained or gap:
                    fruitless = 0
                else:
                    fruitless += 1
                with job.dense.replaced(fitted.values):
                    pruned = batches.run(pair.pruned, [block])
                pair = DepthPair(dense, pruned)
            advance(end - begin, note=f"divergence {fitted.divergence:.4f}")
            begin = end
            block = end
        fitted.refit(pair, None)
    fitted.save_complete()
    return fitted


def _block_before_next_gap(block: int, ends: Mapping[int, int], count: int) -> int:
    for later, end in ends.items():
        if later >= block and end > later + 1:
            return later
    return count


class FittedBlocks:
    """The blocks fitted so far: records, new values, and the divergence from the dense model."""

    def __init__(self, job: Job, batches: Batches, judge: Judge) -> None:
        self.job = job
        self.batches = batches
        self.judge = judge
        self.values: dict[str, Tensor] = {}
        self.records: list[FitRecord] = []
        self.divergence = judge.divergence(batches.entering(), 0, {})
        self._saved_fits: dict[int | None, FitRecord] = {}
        # By the fitted block and the parameter's name: "3/model.layers.3.mlp.down_proj.weight".
        self._tensors: dict[str, Tensor] = {}
        if saved := job.state.find(_SAVED, SavedFits):
            record, tensors = saved
            self._saved_fits = {fit.block: fit for fit in record.fits}
            self._tensors = dict(tensors)

    def refit(self, pair: DepthPair, block: int | None, gap: int = 0) -> bool:
        """Fit a block to the dense states at the end of its gap; return whether that gained.

        A `block` of None is the final norm.
        """
        require_finite((*pair.dense, *pair.pruned))
        before = self.divergence
        if block in self._saved_fits:
            self._add(self._saved_fits[block], self._saved_values(block))
        else:
            self._fit(pair, block, gap)
        return self.divergence < before * (1 - MIN_GAIN)

    def save_complete(self) -> None:
        """Save that there are no more fits, since what comes next may fail."""
        record = SavedFits(fits=tuple(self.records), complete=True)
        self.job.state.save(_SAVED, record, dict(self._tensors))

    def _add(self, record: FitRecord, values: Mapping[str, Tensor]) -> None:
        self.records.append(record)
        if record.kept:
            self.values = {**self.values, **values}
            self.divergence = record.divergence

    def _saved_values(self, block: int | None) -> dict[str, Tensor]:
        # The values go where weights lie, since fast kernels may round differently at other
        # addresses.
        device = self.job.dense.device
        if block is not None:
            device = self.job.dense.places[block]
        values = {}
        for key, value in self._tensors.items():
            of_block, _, name = key.partition("/")
            if of_block == str(block):
                values[name] = self.batches.to_store(value.to(device, copy=True))
        return values

    def _fit(self, pair: DepthPair, block: int | None, gap: int) -> None:
        job = self.job
        stored = job.settings.stored
        regression = BlockRegression(self.batches, pair, block, self.values, stored)
        projections = regression.find_projections()
        if not projections:
            if gap:
                why = "none of its weights write to the residual stream"
                job.notify(Notice(f"The gap at block {block} is not recovered: {why}."))
            return
        max_rounds = None
        if block is not None and not gap:
            max_rounds = ROUNDS_BEHIND
        with regression.loaded(projections):
            solutions = fit_in_rounds(projections, regression.solve, max_rounds)
        exact = [projection.exact for projection in projections]
        if len(solutions) > 1 and any(exact) and not all(exact):
            solutions = solutions[1:]  # how the rest of the block responds was not yet known
        solution = min(solutions, key=lambda solution: solution.error_after)
        new_values = {**self.values, **solution.values}
        divergence = self.judge.divergence(pair.pruned, block, new_values)
        if not math.isfinite(divergence):  # the values overflow float16
            return
        weights: list[str] = []
        for projection in projections:
            weights += projection.names
        record = FitRecord(
            block=block,
            gap=gap,
            weights=tuple(weights),
            exact=all(exact),
            ridge=solution.ridge,
            error_left=solution.error_after / max(solution.error_before, 1e-30),
            divergence=divergence,
            kept=divergence < self.divergence,
        )
        self._add(record, solution.values)
        if record.kept:
            for name, value in solution.values.items():
                self._tensors[f"{block}/{name}"] = value
        saved = SavedFits(fits=tuple(self.records))
        job.state.save_if_due(_SAVED, saved, dict(self._tensors))


def _fitted_features(block: nn.Module, width: int) -> int:
    # A round fits attention's and the MLP's inputs at once.
    inputs = sorted(matrix.inputs for matrix in possible_matrices(block, width))
    return sum(inputs[-2:])
