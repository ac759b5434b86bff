"""Recovery in closed form: kept blocks take over what the removed blocks added to the hidden states.

The dense and the pruned model run side by side, block by block. Behind a gap of removed blocks, the pruned model's
hidden states differ from the dense model's. A ridge regression finds what the last kept block before the gap would have
to add, as a linear map of the input of its last weights, so the map is added to these weights: neither the architecture
nor the cost of inference changes. Then every later block is refitted likewise to the dense hidden states of its depth,
in the model as recovered so far. (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, fits one map for one gap; refitting
every later block, and the weights of positions, are ours.)

Held-out text decides: a fit that does not lower the loss there is not kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.engines import CHECKED_SEQUENCES, choose_engine
from sleb_cli.engine.forward.logits import score_hidden_states
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.recovery.least_squares import Gains, Ridge
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    final_norm,
    find_residual_projections,
    inputs_of,
)
from sleb_cli.engine.recovery.variant import POSITIONS, parameters_replaced
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, FitRecord
from sleb_plugins import UnsupportedModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH_TOKENS = 4096
PATIENCE = 3
"""After this many blocks without a gain, none is refitted until the next gap."""


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
    """New values for some parameters of a block, and the share of the squares that they leave on the held-out text."""

    ridge: float
    values: dict[str, Tensor]
    error_left: float


def recover_in_closed_form(
    skippable: SkippableModel, removed: Collection[int], train: Tensor, held_out: Tensor, notify: Notify
) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    """Fit the kept blocks to the dense model's hidden states.

    Only the hidden states of one depth are in memory, and of a fit only sums of the size of the fitted weights.

    Args:
        skippable: the dense model, as an entered context; its parameters end as they were.
        removed: the removed blocks.
        train: the tokens to fit on, [sequences, positions].
        held_out: the tokens that decide, [sequences, positions].
        notify: the listener for events.

    Returns:
        New values by the dense model's own parameter names, in the model's data type, and a record of every fit.

    Raises:
        UnsupportedModelError: the family's blocks cannot be run one by one.
    """
    with torch.inference_mode():
        engine, reason = choose_engine(skippable, held_out[:CHECKED_SEQUENCES].to(skippable.model.device))
        if engine != "fork":
            raise UnsupportedModelError(
                f"{skippable.model.config.model_type} cannot be recovered: {reason}.", hint="Leave out --recover."
            )
        return _ClosedFormFit(skippable, frozenset(removed), train, held_out, notify).run()


class _ClosedFormFit:
    def __init__(
        self,
        skippable: SkippableModel,
        removed: frozenset[int],
        train: Tensor,
        held_out: Tensor,
        notify: Notify,
    ) -> None:
        self.skippable, self.removed, self.notify = skippable, removed, notify
        self.count = len(skippable.switches)
        self.train, self.held_out = self._text(train), self._text(held_out)
        self.names = {id(parameter): name for name, parameter in skippable.model.named_parameters()}
        self.values: dict[str, Tensor] = {}
        self.fits: list[FitRecord] = []

    def run(self) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        with task(self.notify, "Recovering in closed form", self.count, "blocks") as advance:
            kept = [block for block in range(self.count) if block not in self.removed]
            first = max((block for block in kept if block < min(self.removed)), default=0)
            self.loss, fruitless = self._loss(0, {}), 0
            for block in kept:
                end = self._end_of_gap(block)
                for text in (self.train, self.held_out):
                    text.dense = list(self._leaving(text, text.dense, range(block, end)))
                gap = end > block + 1
                if gap or (block >= first and fruitless < PATIENCE):
                    fruitless = 0 if self._refit(block, end) or gap else fruitless + 1
                with parameters_replaced(self.skippable.model, self.values):
                    for text in (self.train, self.held_out):
                        pruned = self._leaving(text, text.pruned, range(block, block + 1))
                        text.pruned = text.dense if block < first else list(pruned)
                advance(end - block, note=f"held-out loss {self.loss:.4f}")
            self._refit_norm()
        return self.values, ClosedFormRecord(fits=tuple(self.fits))

    def _text(self, sequences: Tensor) -> _Text:
        size = max(1, BATCH_TOKENS // sequences.shape[1])
        ids = list(torch.split(sequences.to(self.skippable.model.device), size))
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

    def _loss(self, block: int, values: Mapping[str, Tensor]) -> float:
        """Return the held-out loss with these values, from the pruned states that enter `block` on."""
        text = self.held_out
        with parameters_replaced(self.skippable.model, values):
            final = self._leaving(text, text.pruned, range(block, self.count), self.removed)
            losses = [
                score_hidden_states(NegativeLogLikelihood(), self.skippable, hidden, ids, positions=POSITIONS)
                for hidden, ids in zip(final, text.ids, strict=True)
            ]
        return float(torch.cat(losses).mean())

    def _refit(self, block: int, end: int) -> bool:
        """Fit a block's output to the dense states at `end`; return whether the held-out loss fell."""
        before = self.loss
        with parameters_replaced(self.skippable.model, self.values):
            projections = find_residual_projections(self.skippable, self.train.calls[0][block], self.train.pruned[0])
        if end > block + 1 and not projections:
            self.notify(Notice(f"The gap after block {block} is not recovered: none of its weights add to its output."))
        for together in projections:
            rows = partial(self._rows, block=block, projections=together)
            self._keep_if_better(block, end - block - 1, together, self._best_fit(rows, together))
        return self.loss < before

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
        loss = self._loss(self.count if block is None else block, values)
        kept = loss < self.loss
        if kept:
            self.values, self.loss = values, loss
        record = FitRecord(
            block=block,
            gap=gap,
            weights=tuple(projection.name for projection in projections),
            exact=projections[0].exact,
            ridge=fit.ridge,
            error_left=fit.error_left,
            loss=loss,
            kept=kept,
        )
        self.fits.append(record)

    def _best_fit(self, rows: Callable[[_Text], Iterator[_Rows]], projections: Sequence[ResidualProjection]) -> _Fit:
        """Fit with each ridge, and return the fit that leaves the least error on the held-out text."""
        train, held_out = (_sums(rows(text), projections) for text in (self.train, self.held_out))
        fits = {ridge: train.solve(ridge) for ridge in RIDGES}
        errors = {ridge: held_out.error(fitted) for ridge, fitted in fits.items()}
        ridge = min(RIDGES, key=lambda ridge: errors[ridge])
        return _Fit(ridge, dict(self._new_values(projections, fits[ridge])), errors[ridge] / max(held_out.yy, 1e-30))

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
        return name, changed.to(parameter.device, parameter.dtype)


def _sums(rows: Iterator[_Rows], projections: Sequence[ResidualProjection]) -> Gains | Ridge:
    sums = Gains() if projections[0].kind == "gain" else Ridge()
    for features, targets, weights in rows:
        sums.add(features, targets, weights)
    return sums


def _has_fitted_bias(projection: ResidualProjection) -> bool:
    return projection.kind != "gain" and projection.has_bias
