"""Fit a block's last weights: states behind its gap should come near the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.recovery.depth import Batches, DepthPair, require_finite
from sleb_cli.engine.recovery.least_squares import Gains, Ridge, best_ridge
from sleb_cli.engine.recovery.residual_projections import (
    ResidualProjection,
    captured,
    final_norm,
    find_residual_projections,
)
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError
from sleb_plugins.errors import explain_out_of_memory

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MIN_GAIN_SHARE = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""

Rows = tuple[Tensor, Tensor, Tensor]
"""Features [positions, features], targets [positions, outputs] and weights [positions]."""


@dataclass(frozen=True)
class _Columns:
    """Neighboring columns of the features: the factors of one parameter."""

    projection: ResidualProjection
    parameter: Literal["weight", "bias"]
    count: int

    @property
    def name(self) -> str:
        """The name of the parameter in the block."""
        return f"{self.projection.name}.{self.parameter}"


def _columns(projections: Sequence[ResidualProjection]) -> list[_Columns]:
    """Return the columns of the features in order: each projection's inputs, then a constant."""
    columns = [_Columns(projection, "weight", projection.inputs) for projection in projections]
    for projection in projections:
        if projection.takes_bias:
            # One constant is enough: all projections add to the same hidden states.
            columns.append(_Columns(projection, "bias", 1))
            break
    return columns


@dataclass(frozen=True)
class Solution:
    """New values by parameter name.

    The errors are weighted sums of squares on the validation text.
    """

    ridge: float
    values: dict[str, Tensor]
    error_before: float
    error_after: float


class BlockRegression:
    """The regressions of a block (None: of the final norm).

    Args:
        pair: the dense model's states at the end of the gap, and the recovered model's before the
            block.
        values: new values of the blocks before it.
        stored: the data type to which values are rounded.
    """

    def __init__(
        self,
        batches: Batches,
        pair: DepthPair,
        block: int | None,
        values: Mapping[str, Tensor],
        stored: torch.dtype,
    ) -> None:
        self.batches = batches
        self.pair = pair
        self.block = block
        self.values = values
        self.stored = stored
        self.skippable = batches.skippable
        self._root: nn.Module = self.skippable.model
        self._prefix = ""
        self._device = self.skippable.device
        if block is not None:
            self._root = self.skippable.switches[block].block
            self._device = self.skippable.places[block]
            for name, module in self.skippable.model.named_modules():
                if module is self._root:
                    self._prefix = f"{name}."

    def find_projections(self) -> list[ResidualProjection]:
        """Find the modules to fit."""
        skippable = self.skippable
        first = self.pair.pruned[0]
        if self.block is None:
            return final_norm(skippable, first.to(skippable.device), self.batches.ids[0])
        call = self.batches.probe[self.block]
        with skippable.loaded(self.block), skippable.replaced(self.values):
            return find_residual_projections(skippable, call, first[: len(call.entering)])

    def loaded(self, projections: Sequence[ResidualProjection]) -> AbstractContextManager[None]:
        """Have the weights to fit in memory within a context, as they may be streamed."""
        if self.block is None:
            return loaded(self._root.get_submodule(projections[0].name))
        return self.skippable.loaded(self.block)

    def solve(
        self, projections: Sequence[ResidualProjection], fitted_before: Mapping[str, Tensor]
    ) -> Solution:
        """Fit these projections at once, given the block's values so far.

        The ridge is chosen on the validation text.
        """
        values = {**self.values, **fitted_before}
        gains_only = projections[0].kind == "gain"
        train_batches: Sequence[int] = self.batches.train
        if gains_only:
            train_batches = self.batches.train_for_gains
        train = self._sums(projections, values, train_batches)
        validation = self._sums(projections, values, self.batches.validation)
        require_finite((*train.tensors, *validation.tensors))
        names = " and ".join(projection.name for projection in projections)
        sums_bytes = 4 * (train.xx.nbytes + train.xy.nbytes)
        # A smaller batch would not help.
        with explain_out_of_memory(
            f"Fitting {names} needs about {format_bytes(sums_bytes)} of memory for its sums.",
            "Leave out --recover, or use a machine or a --device with more memory.",
            MachineError,
        ):
            best = best_ridge(train, validation, RIDGES)
            new: dict[str, Tensor] = {}
            changes = self._changes(projections, best.coefficients, values)
            for name, change in changes.items():
                before = as_float64(self._value(name, values))
                changed = before.to(change.device) + change
                device = self._root.get_parameter(name).device
                rounded = changed.to(device, self.stored).contiguous()
                new[self._prefix + name] = self.batches.to_store(rounded)
        return Solution(best.ridge, new, float(validation.yy), best.error)

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return values.get(self._prefix + name, self._root.get_parameter(name))

    def _changes(
        self,
        projections: Sequence[ResidualProjection],
        coefficients: Tensor,
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the changes of parameters by their names in the block, in float64."""
        all_columns = _columns(projections)
        counts = [columns.count for columns in all_columns]
        changes: dict[str, Tensor] = {}
        for columns, change in zip(all_columns, coefficients.split_with_sizes(counts), strict=True):
            projection = columns.projection
            if columns.parameter == "bias":
                changes[columns.name] = change[0]
                continue
            if projection.norm:
                divisors = self._divisors(projection.norm, values)
                change = change / divisors.to(change.device)
            if projection.kind == "matrix":
                change = change.T
            changes[columns.name] = change
        return changes

    def _divisors(self, norm: ResidualProjection, values: Mapping[str, Tensor]) -> Tensor:
        """Return the gains of a norm, and infinity where it multiplies by next to nothing."""
        weight = self._value(f"{norm.name}.weight", values)
        gains = as_float64(weight) + norm.offset
        sizes = gains.abs()
        silent = sizes < MIN_GAIN_SHARE * sizes.mean()
        return gains.masked_fill(silent, torch.inf)

    def _sums(
        self,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
        batches: Iterable[int],
    ) -> Ridge:
        """Return the sums of the regression over these batches."""
        sums = self._empty_sums(projections)
        for batch in batches:
            if self.block is None:
                sums.add(*self._rows_of_norm(projections[0], batch))
            else:
                sums.add(*self._rows(self.block, projections, values, batch))
        return sums

    def _empty_sums(self, projections: Sequence[ResidualProjection]) -> Ridge:
        features = sum(columns.count for columns in _columns(projections))
        if projections[0].kind == "gain":
            return Gains(features, self._device)
        model = self.skippable.model
        outputs = model.config.get_text_config().hidden_size
        # In bfloat16, the features are rounded already.
        rounded = model.dtype is torch.bfloat16
        return Ridge(features, outputs, self._device, rounded=rounded)

    def _rows(
        self,
        block: int,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
        batch: int,
    ) -> Rows:
        """Return a batch's rows of the regression of a block."""
        skippable = self.skippable
        root = self._root
        names: list[str] = []
        for projection in projections:
            names += projection.names
        call = self.batches.calls[batch][block]
        features: list[Tensor] = []
        with skippable.replaced(values), captured(root, names) as (entering, _):
            states = skippable.run_block(call, self.pair.pruned[batch]).float()
            target = self.pair.dense[batch].to(states.device).float()
            missing = (target - states).flatten(0, -2)
            for columns in _columns(projections):
                projection = columns.projection
                if columns.parameter == "weight":
                    features.append(projection.features(root, entering))
                else:
                    features.append(missing.new_full((len(missing), 1), projection.scale))
        # Norms divide hidden states by their size before anything reads them, so errors count
        # relative to it. Otherwise the few positions whose states are a thousand times larger,
        # often the first, would decide.
        squares = target.square().mean(-1).flatten()
        weights = 1 / squares.clamp_min(1e-12)
        return torch.cat(features, dim=1), missing, weights

    def _rows_of_norm(self, norm: ResidualProjection, batch: int) -> Rows:
        """Return a batch's rows of the regression of the final norm."""
        device = self._device
        module = self._root.get_submodule(norm.name)
        dense = self.pair.dense[batch].to(device)
        pruned = self.pair.pruned[batch].to(device)
        target = module(dense).float().to(device)
        output = module(pruned).float().to(device)
        missing = (target - output).flatten(0, -2)
        features = norm.normalized(self._root, pruned)
        # The outputs of a norm are all of one size, so all positions weigh the same.
        weights = torch.ones(len(missing), device=device)
        return features, missing, weights


Fit = Callable[[Sequence[ResidualProjection], Mapping[str, Tensor]], Solution]
"""Fits some projections at once, given the block's values so far."""


def fit_in_rounds(
    projections: Sequence[ResidualProjection], fit: Fit, max_rounds: int | None = None
) -> list[Solution]:
    """Fit all projections of a block in rounds; return the block's solution after each."""
    solutions: list[Solution] = []
    values: dict[str, Tensor] = {}
    for together in _rounds(projections)[:max_rounds]:
        solution = fit(together, values)
        values = values | solution.values
        error_after = solution.error_after
        for projection in together:
            if projection.norm:
                values, error_after = _fit_gains(projection.norm, fit, values)
        error_before = solutions[0].error_before if solutions else solution.error_before
        solutions.append(Solution(solution.ridge, values, error_before, error_after))
    return solutions


def _rounds(projections: Sequence[ResidualProjection]) -> list[list[ResidualProjection]]:
    """Return which projections are fitted together, in order."""
    exact = [projection for projection in projections if projection.exact]
    near = [projection for projection in projections if not projection.exact]
    rounds = []
    if near:
        # An output that the rest of the block reads (attention's, which the MLP reads) is fitted as
        # though nothing responded to it, with the others, so that none adds what another can add
        # better.
        exact_matrices = [projection for projection in exact if projection.kind != "gain"]
        rounds.append(exact_matrices + near)
    if exact:
        # These make up for the response.
        rounds.append(exact)
    if any(projection.norm for projection in exact):
        # Through a norm, a matrix W adds gain * W x / s for an input x, where s is the size of W x:
        # linear in W only for a fixed s. What a fit makes smaller, the norm makes larger again. So
        # each round fits W, then the gains, which is exact, and a last one both, with the new s.
        rounds.append(exact)
    return rounds


def _fit_gains(
    norm: ResidualProjection, fit: Fit, values: dict[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Fit a norm's gains; return the block's values and error, unchanged if that does not help."""
    gains = fit([norm], values)
    if gains.error_after < gains.error_before:
        return values | gains.values, gains.error_after
    return values, gains.error_before
