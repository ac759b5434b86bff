"""Recovery in closed form: kept blocks take over what the removed blocks added to the hidden
states.

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
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.forecast import announce
from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.memory_needs import states_bytes
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.block_fit import BlockFit, fit_block
from sleb_cli.engine.recovery.depth import (
    JUDGED_POSITIONS,
    Batches,
    DepthPair,
    Judge,
    require_finite,
)
from sleb_cli.engine.recovery.least_squares import ridge_bytes
from sleb_cli.engine.recovery.residual_projections import possible_projections
from sleb_cli.engine.recovery.stage import HIDDEN_STATES, Fields, Job, Stage, kept_blocks
from sleb_cli.engine.recovery.unfinished import count_fits, fit_file, read_saved, write_saved
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError

BATCH_TOKENS = 4096
PATIENCE = 3
"""After this many blocks in a row that gain next to nothing, no more are refitted until the next
gap.
"""
MIN_GAIN = 0.01
"""A fit that lowers the divergence by less than this share of it is kept, but counts as no gain."""
ROUNDS = 2
"""How often the block before a gap is fitted: all projections at once, then those that nothing else
in it reads.
"""
ROUNDS_BEHIND = 1
"""How often a later block is fitted: a second round gains nothing there."""


@dataclass(frozen=True)
class ClosedForm(Stage):
    """The recovery in closed form, always the first stage: it starts from the dense model's values."""

    title, model, measured, streams = "Recovery", "recovered", "closed_form", True

    def reserved_bytes(self, surgery: Surgery) -> int:
        """Return the bytes of the largest fit's sums."""
        width = surgery.architecture.text_config.hidden_size
        return max(
            ridge_bytes(_fitted_features(block, width), width) for block in kept_blocks(surgery)
        )

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of hidden states and sums."""
        states = states_bytes(surgery.architecture, dtype, tokens)
        # Entering the model, entering a block in both models, and leaving it.
        return {HIDDEN_STATES: 4 * states, "regression sums": self.reserved_bytes(surgery)}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of all fits at most."""
        # From the block before the first gap on.
        fitted = kept_blocks(surgery)[max(0, min(surgery.removed) - 1) :]
        width: int = surgery.architecture.text_config.hidden_size
        return sum(_fitted_features(block, width) * width for block in fitted) * stored.itemsize

    def run(self, job: Job, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Fields]:
        """Fit in closed form, or take over the fits of an interrupted run, which may be all of
        them.
        """
        assert not values
        whole = job.saved / "closed-form.safetensors"
        if job.group.is_main and (count := count_fits(job.saved)):
            job.notify(Notice(f"Continuing with {plural(count, 'fit')} of an interrupted run."))
        if job.group.from_main(whole.exists):
            record, new_values = read_saved(whole, ClosedFormRecord)
            for fit in record.fits:
                new_values |= read_saved(fit_file(job.saved, fit.block), FitRecord)[1]
        else:
            new_values, record = recover_in_closed_form(job)
            if job.group.is_main:
                write_saved(whole, record, {})
        return new_values, lambda losses: {"closed_form": record, "closed_form_losses": losses}


def recover_in_closed_form(job: Job) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states; return new values by the dense
    model's parameter names.

    Memory holds the hidden states of one depth, and sums of the size of the fitted weights. If
    blocks are streamed, a fit reads its own block twice, and the blocks behind it once. All tokens
    of the text count, as later ones attend to them. Values do not depend on the number of
    processes.
    """
    dense, train, validation = job.dense, job.train.sequences, job.validation.sequences
    with torch.inference_mode():
        if reason := why_not_fork(dense, validation[:CHECKED_SEQUENCES].to(dense.device)):
            raise UnsupportedModelError(
                f"{dense.model.config.model_type} cannot be recovered: {reason}.",
                hint="Leave out --recover.",
            )

        fit_blocks, size = partial(_fit_blocks, job), max(1, BATCH_TOKENS // train.shape[1])
        _announce(job, size)
        # Several processes have the same batches, so one cannot take smaller ones by itself.
        if job.group.size > 1:
            return fit_blocks(size)
        return in_smaller_pieces(fit_blocks, size, dense.device, job.notify, "fitting {} sequences")


def _fit_blocks(job: Job, size: int) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    count, removed = len(job.dense.switches), job.settings.surgery.removed
    kept = [block for block in range(count) if block not in removed]
    ends = dict(pairwise([*kept, count]))  # where the gap behind a block ends
    with task(job.notify, "Recovering in closed form", count, "blocks") as advance:
        # The block before the first gap; without one, the first that stays makes up for what was
        # before it.
        block = max((block for block in kept if block < min(removed)), default=kept[0])
        begin, fruitless = block if 0 in kept else 0, 0
        batches = Batches(job, size)
        fits = Fits(job, batches, Judge(job, batches, size))
        pair = batches.entering(begin)
        advance(begin)
        while begin < count:
            end = ends[block]
            if (gap := end - begin - 1) or fruitless < PATIENCE:
                # From here to the end of the step, the dense model is behind the gap, and the
                # pruned one before it.
                pair = replace(
                    pair, dense=batches.run_blocks(pair.dense, range(begin, end), batches.all)
                )
                fruitless = 0 if fits.refit(pair, block, gap) or gap else fruitless + 1
                with job.dense.replaced(fits.values):
                    pair = replace(
                        pair, pruned=batches.run_blocks(pair.pruned, [block], batches.all)
                    )
            else:  # nothing is gained here, so both models run on to the next gap
                end = next(
                    (later for later in kept if later >= block and ends[later] > later + 1), count
                )
                pair = batches.advance(pair, range(block, end), only_for_gains=end == count)
            advance(end - begin, note=f"divergence {fits.divergence:.4f}")
            begin = block = end
        fits.refit(pair, None)
    return fits.values, ClosedFormRecord(fits=tuple(fits.records))


class Fits:
    """The fits so far, the values that they keep, and the divergence from the dense model with
    these.
    """

    def __init__(self, job: Job, batches: Batches, judge: Judge) -> None:
        self.job, self.batches, self.judge = job, batches, judge
        self.values: dict[str, Tensor] = {}
        self.records: list[FitRecord] = []
        self.divergence = judge.divergence(batches.entering(0).pruned, 0, {})

    def refit(self, pair: DepthPair, block: int | None, gap: int = 0) -> bool:
        """Fit a block to the dense states at the end of its gap (None: the final norm); return
        whether that gained.
        """
        before = self.divergence
        require_finite((*pair.dense, *pair.pruned))
        if fit := self._read_saved_fit(block) or self._fit_block(pair, block, gap):
            record, values = fit
            self.records.append(record)
            if record.kept:
                self.values, self.divergence = self.values | values, record.divergence
        return self.divergence < before * (1 - MIN_GAIN)

    def _read_saved_fit(self, block: int | None) -> tuple[FitRecord, dict[str, Tensor]] | None:
        job, dense = self.job, self.job.dense
        file = fit_file(job.saved, block)
        saved = job.group.from_main(lambda: read_saved(file, FitRecord) if file.exists() else None)
        if saved is None:
            return None
        record, tensors = saved
        # The values go where weights lie, since fast kernels may round differently at other
        # addresses.
        device = dense.device if block is None else dense.places[block]
        return record, {
            name: self.batches.to_store(value.to(device, copy=True))
            for name, value in tensors.items()
        }

    def _fit_block(
        self, pair: DepthPair, block: int | None, gap: int
    ) -> tuple[FitRecord, dict[str, Tensor]] | None:
        job, regression = (
            self.job,
            BlockFit(self.batches, pair, block, self.values, self.job.settings.stored),
        )
        projections = job.group.from_main(regression.find_projections)
        if not projections:
            if gap:
                why = "none of its weights write to the residual stream"
                job.notify(Notice(f"The gap at block {block} is not recovered: {why}."))
            return None
        with regression.loaded(projections):
            fit = fit_block(
                projections, regression.fit, None if gap or block is None else ROUNDS_BEHIND
            )
        behind = len(job.dense.switches) if block is None else block
        divergence = self.judge.divergence(pair.pruned, behind, self.values | fit.values)
        if not math.isfinite(divergence):  # the values overflow float16
            return None
        kept = divergence < self.divergence
        record = FitRecord(
            block=block,
            gap=gap,
            weights=tuple(name for projection in projections for name in projection.names),
            exact=all(projection.exact for projection in projections),
            ridge=fit.ridge,
            error_left=fit.error_after / max(fit.error_before, 1e-30),
            divergence=divergence,
            kept=kept,
        )
        values = fit.values if kept else {}
        if job.group.is_main:
            write_saved(fit_file(job.saved, block), record, values)
        return record, values


def _announce(job: Job, size: int) -> None:
    dense, removed = job.dense, job.settings.surgery.removed
    validation = job.validation.sequences.numel()
    both, judged = job.train.sequences.numel() + validation, min(validation, 2 * BATCH_TOKENS)
    begin = max(0, min(removed) - 1)
    max_fits = max(1, len(dense.switches) - len(removed) - begin - count_fits(job.saved))
    gaps = sum(block - 1 not in removed for block in removed)

    def tokens(fits: int) -> float:
        # A round runs its block and sums up products, which takes about half as long. Both models
        # run once more. Before and after, the rest of the pruned one runs on what is judged, and
        # the logits of both are compared, which takes about as long as their heads.
        heads = 4 * dense.head_blocks * min(judged, JUDGED_POSITIONS)
        judging = (fits + 2) * ((max_fits - fits / 2) * judged + heads)
        rounds = gaps * ROUNDS + (fits - gaps) * ROUNDS_BEHIND
        return (begin + 2 * fits + 1.5 * rounds) * both + judging

    title = f"Recovery: up to {plural(max_fits, 'block')} fitted to {both - validation:,} tokens"
    # Fits stop where nothing is gained, so the time is between these two.
    left, fewest = (
        tokens(fits) / job.group.size for fits in (max_fits, min(max_fits, gaps * (1 + PATIENCE)))
    )
    announce(job.notify, title, left, dense, job.train.sequences[:size].to(dense.device), fewest)


def _fitted_features(block: nn.Module, width: int) -> int:
    # A round fits attention's and the MLP's inputs at once.
    projections = possible_projections(block, width)
    return sum(
        sorted(projection.inputs for projection in projections if projection.kind != "gain")[-2:]
    )
