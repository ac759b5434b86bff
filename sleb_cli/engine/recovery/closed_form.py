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

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import as_float64, in_smaller_pieces, translate_out_of_memory
from sleb_cli.engine.forward.engines import CHECKED_SEQUENCES, choose_engine
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.recovery.least_squares import Gains, Ridge, ridge_bytes
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    final_norm,
    find_residual_projections,
    inputs_of,
)
from sleb_cli.engine.recovery.variant import Variant, parameters_replaced, summed_losses
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError, UnsupportedModelError

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH_TOKENS = 4096
PATIENCE = 3
"""After this many blocks without a gain, none is refitted until the next gap."""
DECIDING_POSITIONS = 2048
"""On about how many positions fits are compared: enough, since both sides of a comparison see the same."""


@dataclass
class _Text:
    """Some sequences, and their hidden states at one depth of the dense and of the recovered model, batch by batch."""

    ids: list[Tensor]
    calls: list[list[Call]]
    dense: list[Tensor]
    pruned: list[Tensor]


_Rows = tuple[Tensor, Tensor, Tensor]
"""The features [rows, features], targets [rows, outputs] and weights [rows] of some positions."""


@dataclass(frozen=True)
class _Fit:
    """New values for some parameters of a block, and the share of the squares that they leave on the deciding text."""

    ridge: float
    values: dict[str, Tensor]
    error_left: float


def recover_in_closed_form(
    skippable: SkippableModel,
    removed: Collection[int],
    train: Tensor,
    deciding: Tensor,
    notify: Notify,
    *,
    stored: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states.

    Only the hidden states of one depth are in memory, and of a fit only sums of the size of the fitted weights.

    Args:
        skippable: the dense model, as an entered context; its parameters end as they were.
        removed: the removed blocks.
        train: the tokens to fit on, [sequences, positions].
        deciding: the tokens that decide, [sequences, positions].
        notify: the listener for events.
        stored: the data type of the checkpoint, to which values are rounded; None for the model's.

    Returns:
        New values by the dense model's own parameter names, rounded to what is stored, and a record of every fit.

    Raises:
        UnsupportedModelError: the family's blocks cannot be run one by one.
        MachineError: the sums of a fit do not fit into memory, or not even one sequence at a time does.
    """
    device, length = skippable.model.device, deciding.shape[1]
    with torch.inference_mode():
        engine, reason = choose_engine(skippable, deciding[:CHECKED_SEQUENCES].to(device))
        if engine != "fork":
            raise UnsupportedModelError(
                f"{skippable.model.config.model_type} cannot be recovered: {reason}.", hint="Leave out --recover."
            )
        return in_smaller_pieces(
            lambda batch: _ClosedFormFit(skippable, frozenset(removed), (train, deciding), batch, stored, notify).run(),
            max(1, BATCH_TOKENS // length),
            lambda batch: notify(Notice(f"Out of memory on {device}; fitting with {batch} sequences at once.")),
        )


class _ClosedFormFit:
    def __init__(
        self,
        skippable: SkippableModel,
        removed: frozenset[int],
        texts: tuple[Tensor, Tensor],
        batch: int,
        stored: torch.dtype | None,
        notify: Notify,
    ) -> None:
        self.skippable, self.removed, self.notify = skippable, removed, notify
        self.batch, self.stored = batch, stored or skippable.model.dtype
        self.count = len(skippable.switches)
        self.train, self.deciding = map(self._text, texts)
        self.dense_final = list(self._leaving(self.deciding, self.deciding.dense, range(self.count)))
        length, sequences = texts[1].shape[1], len(texts[1])
        step = max(1, sequences * (length - 1) // DECIDING_POSITIONS)
        self.positions = torch.arange(0, length - 1, step, device=skippable.model.device)
        self.names = {id(parameter): name for name, parameter in skippable.model.named_parameters()}
        self.values: dict[str, Tensor] = {}
        self.fits: list[FitRecord] = []

    def run(self) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        with task(self.notify, "Recovering in closed form", self.count, "blocks") as advance:
            kept = [block for block in range(self.count) if block not in self.removed]
            # The block before the first gap; without one, the first that stays makes up for what was before it.
            first = max((block for block in kept if block < min(self.removed)), default=kept[0])
            self.divergence, fruitless, begin = self._divergence(0, {}), 0, 0
            for block in kept:
                end = self._end_of_gap(block)
                for text in (self.train, self.deciding):
                    text.dense = list(self._leaving(text, text.dense, range(begin, end)))
                gap = end - begin - 1
                if gap or (block >= first and fruitless < PATIENCE):
                    fruitless = 0 if self._refit(block, end, gap) or gap else fruitless + 1
                with parameters_replaced(self.skippable.model, self.values):
                    for text in (self.train, self.deciding):
                        pruned = self._leaving(text, text.pruned, range(block, block + 1))
                        text.pruned = text.dense if block < first else list(pruned)
                advance(end - begin, note=f"divergence {self.divergence:.4f}")
                begin = end
            self._refit_norm()
        return self.values, ClosedFormRecord(fits=tuple(self.fits))

    def _text(self, sequences: Tensor) -> _Text:
        ids = list(torch.split(sequences.to(self.skippable.model.device), self.batch))
        calls = [self.skippable.calls(batch) for batch in ids]
        entering = [batch[0].entering for batch in calls]
        return _Text(ids, calls, entering, list(entering))

    def _end_of_gap(self, block: int) -> int:
        return next((depth for depth in range(block + 1, self.count) if depth not in self.removed), self.count)

    def _leaving(
        self, text: _Text, entering: Sequence[Tensor], blocks: range, removed: Collection[int] = ()
    ) -> Iterator[Tensor]:
        """Yield what leaves the last of these blocks, batch by batch."""
        for calls, hidden in zip(text.calls, entering, strict=True):
            states = self.skippable.run_blocks(calls[blocks.start : blocks.stop], hidden, removed)
            yield deque(states, maxlen=1).pop()

    def _divergence(self, block: int, values: Mapping[str, Tensor]) -> float:
        """Return the divergence with these values on the deciding text, from the pruned states that enter `block`."""
        text, total = self.deciding, 0.0
        dense, recovered = Variant(self.skippable), Variant(self.skippable, self.removed, values)
        for calls, hidden, dense_final, ids in zip(text.calls, text.pruned, self.dense_final, text.ids, strict=True):
            with parameters_replaced(self.skippable.model, values):
                final = deque(self.skippable.run_blocks(calls[block:], hidden, self.removed), maxlen=1).pop()
            total += summed_losses(recovered, dense, final, dense_final, ids, self.positions)[1]
        return total / (len(self.positions) * sum(map(len, text.ids)))

    def _refit(self, block: int, end: int, gap: int) -> bool:
        """Fit a block's output to the dense states at `end`; return whether the divergence fell."""
        before = self.divergence
        with parameters_replaced(self.skippable.model, self.values):
            projections = find_residual_projections(self.skippable, self.train.calls[0][block], self.train.pruned[0])
        if gap and not projections:
            self.notify(Notice(f"The gap at block {block} is not recovered: none of its weights add to its output."))
        for together in projections:
            rows = partial(self._rows, block=block, projections=together)
            self._keep_if_better(block, gap, together, self._best_fit(rows, together))
        return self.divergence < before

    def _refit_norm(self) -> None:
        """Refit the gains of the final norm, and so the scale of the logits, to the dense model's states there."""
        norm = final_norm(self.skippable, self.train.pruned[0], self.train.ids[0])
        if norm is not None:
            rows = partial(self._rows_of_norm, norm=norm)
            self._keep_if_better(None, 0, [norm], self._best_fit(rows, [norm]))

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
            weights=tuple(projection.name for projection in projections),
            exact=projections[0].exact,
            ridge=fit.ridge,
            error_left=fit.error_left,
            divergence=divergence,
            kept=kept,
        )
        self.fits.append(record)

    def _best_fit(self, rows: Callable[[_Text], Iterator[_Rows]], projections: Sequence[ResidualProjection]) -> _Fit:
        """Fit with each ridge, and return the fit that leaves the least error on the deciding text."""
        train, deciding = (_sums(rows(text), projections) for text in (self.train, self.deciding))
        names = " and ".join(projection.name for projection in projections)
        with _enough_for_sums(names, train):
            best: tuple[float, float, Tensor] | None = None
            for ridge in RIDGES:  # one after the other, since coefficients are as large as the weights in float64
                fitted = train.solve(ridge)
                error = deciding.error(fitted)
                if best is None or error < best[0]:
                    best = (error, ridge, fitted)
            assert best is not None
            error, ridge, fitted = best
            return _Fit(ridge, dict(self._new_values(projections, fitted)), error / max(deciding.yy, 1e-30))

    def _rows(self, text: _Text, block: int, projections: Sequence[ResidualProjection]) -> Iterator[_Rows]:
        """Yield features, what is missing at the end of the gap, and weights, batch by batch, in float32.

        Norms divide hidden states by their size before anything reads them, so an error is weighed relative to that
        size: otherwise the few positions whose states are a thousand times larger, often the first, would decide.
        """
        modules = [projection.module for projection in projections]
        for calls, dense, pruned in zip(text.calls, text.dense, text.pruned, strict=True):
            with parameters_replaced(self.skippable.model, self.values), inputs_of(modules) as entering:
                missing = (dense.float() - self.skippable.run_block(calls[block], pruned).float()).flatten(0, -2)
                parts = [projection.features(entering[projection.module]) for projection in projections]
            ones = [
                missing.new_full((len(missing), 1), projection.scale)
                for projection in projections
                if _has_fitted_bias(projection)
            ]
            weights = 1 / dense.float().square().mean(-1).flatten().clamp_min(1e-12)
            yield torch.cat([*parts, *ones[:1]], dim=1), missing, weights

    def _rows_of_norm(self, text: _Text, norm: ResidualProjection) -> Iterator[_Rows]:
        """Yield the same for the final norm, whose output is normalized already, so all positions weigh the same."""
        for dense, pruned in zip(text.dense, text.pruned, strict=True):
            wanted, found = (norm.module(states).float().flatten(0, -2) for states in (dense, pruned))
            yield norm.features(pruned), wanted - found, torch.ones(len(found), device=found.device)

    def _new_values(self, projections: Sequence[ResidualProjection], fitted: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the new weights of the projections, by name, and the new bias of the first that has one."""
        start = 0
        for projection in projections:
            weight = projection.module.get_parameter("weight")
            size = weight.shape[{"matrix": 1, "transposed": 0, "gain": 0}[projection.kind]]
            part = fitted[start : start + size]
            start += size
            yield self._changed(weight, part.T if projection.kind == "matrix" else part)
        with_bias = [projection for projection in projections if _has_fitted_bias(projection)]
        if with_bias:
            yield self._changed(with_bias[0].module.get_parameter("bias"), fitted[start])

    def _changed(self, parameter: nn.Parameter, change: Tensor) -> tuple[str, Tensor]:
        name = self.names[id(parameter)]
        changed = as_float64(self.values.get(name, parameter)).to(change.device) + change
        return name, changed.to(parameter.device, self.stored)


def _enough_for_sums(names: str, sums: Gains | Ridge) -> AbstractContextManager[None]:
    """Say what a fit needs if there is no memory for it; a smaller batch would not help."""
    return translate_out_of_memory(
        f"The fit of {names} needs about {format_bytes(sums.bytes_to_solve)} of memory for its sums.",
        "Leave out --recover, or use a machine or a --device with more memory.",
        MachineError,
    )


def fitting_bytes(block: nn.Module, width: int) -> int:
    """Return about how much memory the fits of a block need beside the model, for the largest of its projections."""
    inputs = [m.in_features for m in block.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    return ridge_bytes(max(inputs, default=0), width)


def _sums(rows: Iterator[_Rows], projections: Sequence[ResidualProjection]) -> Gains | Ridge:
    sums = Gains() if projections[0].kind == "gain" else Ridge()
    for features, targets, weights in rows:
        sums.add(features, targets, weights)
    return sums


def _has_fitted_bias(projection: ResidualProjection) -> bool:
    return projection.kind != "gain" and projection.has_bias
