"""Fit a block: change its last weights so that the hidden states behind its gap come close to the
dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

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

Samples = Iterator[tuple[Tensor, Tensor, Tensor]]
"""The features [positions, features], targets [positions, outputs] and weights [positions], batch
by batch.
"""


@dataclass(frozen=True)
class Fit:
    """New values by parameter name; the errors are weighted sums of squares on the validation text."""

    ridge: float
    values: dict[str, Tensor]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class BlockFit:
    """The regressions of a block (None: of the final norm).

    Attributes:
        pair: the dense model's states at the end of the gap, and the recovered model's before the
            block.
        values: new values of the blocks before it.
        stored: the data type to which values are rounded.
    """

    batches: Batches
    pair: DepthPair
    block: int | None
    values: Mapping[str, Tensor]
    stored: torch.dtype

    @property
    def _root(self) -> nn.Module:
        skippable = self.batches.skippable
        return skippable.model if self.block is None else skippable.switches[self.block].block

    def find_projections(self) -> list[ResidualProjection]:
        """Find the modules to fit."""
        batches, first = self.batches, self.pair.pruned[0]
        skippable = batches.skippable
        if self.block is None:
            return final_norm(skippable, first.to(skippable.device), batches.ids[0])
        call = batches.probes[0][self.block]
        with skippable.loaded(self.block), skippable.replaced(self.values):
            return find_residual_projections(skippable, call, first[: len(call.entering)])

    def loaded(self, projections: Sequence[ResidualProjection]) -> AbstractContextManager[None]:
        """Have the weights to fit in memory within a context, as they may be streamed."""
        if self.block is None:
            return loaded(self._root.get_submodule(projections[0].name))
        return self.batches.skippable.loaded(self.block)

    def fit(
        self, projections: Sequence[ResidualProjection], fitted_before: Mapping[str, Tensor]
    ) -> Fit:
        """Fit these projections at once, given the block's values so far; choose the ridge on the
        validation text.
        """
        values, root, group = {**self.values, **fitted_before}, self._root, self.batches.group
        named = self.batches.skippable.model.named_modules()
        prefix = next(f"{name}." if name else "" for name, module in named if module is root)
        train, validation = self._sums_of_both_texts(projections, values)

        def value_of(name: str) -> Tensor:
            return values.get(prefix + name, root.get_parameter(name))

        # A smaller batch would not help.
        with explain_out_of_memory(
            f"Fitting {' and '.join(projection.name for projection in projections)} needs about "
            f"{format_bytes(4 * (train.xx.nbytes + train.xy.nbytes))} of memory for its sums.",
            "Leave out --recover, or use a machine or a --device with more memory.",
            MachineError,
        ):
            solved = (
                best_ridge(train, validation, RIDGES)
                if group.is_main
                else (0.0, 0.0, torch.empty_like(train.xy))
            )
            ridge, after = group.from_main(lambda: solved[:2])
            fitted, new = group.broadcast(solved[2].contiguous()), dict[str, Tensor]()
            for name, change in _weight_changes(projections, fitted, value_of):
                changed = as_float64(value_of(name)).to(change.device) + change
                device = root.get_parameter(name).device
                new[prefix + name] = self.batches.to_store(
                    changed.to(device, self.stored).contiguous()
                )
        return Fit(ridge, new, float(validation.yy), after)

    def _sums_of_both_texts(
        self, projections: Sequence[ResidualProjection], values: Mapping[str, Tensor]
    ) -> tuple[Ridge, Ridge]:
        batches, skippable = self.batches, self.batches.skippable
        if self.block is None:
            samples, device = partial(self._samples_of_norm, projections[0]), skippable.device
        else:
            samples, device = (
                partial(self._samples, projections, values),
                skippable.places[self.block],
            )
        inputs = sum(projection.inputs for projection in projections)
        outputs = skippable.model.config.get_text_config().hidden_size
        has_gains = projections[0].kind == "gain"
        has_bias = any(projection.takes_bias for projection in projections)
        rounded = skippable.model.dtype is torch.bfloat16  # so the features are rounded already

        def empty() -> Ridge:
            return (
                Gains(inputs, device)
                if has_gains
                else Ridge(inputs + has_bias, outputs, device, rounded=rounded)
            )

        groups = batches.train_for_gains if has_gains else batches.train
        train, validation = (
            self._sum_over_groups(samples, at, empty) for at in (groups, batches.validation)
        )
        require_finite((*train.tensors, *validation.tensors))
        return train, validation

    def _sum_over_groups(
        self,
        samples: Callable[[Iterable[int]], Samples],
        groups: Sequence[range],
        empty: Callable[[], Ridge],
    ) -> Ridge:
        group = self.batches.group
        # Groups are added in order, so rounding is the same for any number of processes.
        total, size, rank = empty(), group.size, group.rank
        for first in range(0, len(groups), size):
            turn, own_sums = groups[first : first + size], empty()
            for features, targets, weights in samples(turn[rank]) if rank < len(turn) else ():
                own_sums.add(features, targets, weights)
            for source in range(len(turn)):
                sums = own_sums if source == rank else empty()
                for sum_, added in zip(total.tensors, sums.tensors, strict=True):
                    sum_ += group.broadcast(added, source)
        return total

    def _samples(
        self,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
        batches: Iterable[int],
    ) -> Samples:
        assert self.block is not None
        skippable, module = self.batches.skippable, self._root
        names = [name for projection in projections for name in projection.names]
        scales = [projection.scale for projection in projections if projection.takes_bias]
        for batch in batches:
            with skippable.replaced(values), captured(module, names) as (entering, _):
                states = skippable.run_block(
                    self.batches.calls[batch][self.block], self.pair.pruned[batch]
                ).float()
                target = self.pair.dense[batch].to(states.device).float()
                missing = (target - states).flatten(0, -2)
                parts = [projection.features(module, entering) for projection in projections]
            ones = [missing.new_full((len(missing), 1), scale) for scale in scales[:1]]
            # Norms divide hidden states by their size before anything reads them, so errors count
            # relative to it. Otherwise the few positions whose states are a thousand times larger,
            # often the first, would decide.
            weights = 1 / target.square().mean(-1).flatten().clamp_min(1e-12)
            yield torch.cat([*parts, *ones], dim=1), missing, weights

    def _samples_of_norm(self, norm: ResidualProjection, batches: Iterable[int]) -> Samples:
        model, here = self.batches.skippable.model, self.batches.skippable.device
        module = model.get_submodule(norm.name)
        for batch in batches:
            dense, pruned = self.pair.dense[batch].to(here), self.pair.pruned[batch].to(here)
            target, output = (
                module(states).float().flatten(0, -2).to(here) for states in (dense, pruned)
            )
            # The outputs of a norm are all of one size, so all positions weigh the same.
            yield (
                norm.normalized(model, pruned),
                target - output,
                torch.ones(len(output), device=here),
            )


def fit_block(
    projections: Sequence[ResidualProjection],
    fit: Callable[[Sequence[ResidualProjection], Mapping[str, Tensor]], Fit],
    max_rounds: int | None = None,
) -> Fit:
    """Fit all projections of a block in rounds; `fit` fits some of them at once, given the values
    so far.
    """
    # In the first round, an output that the rest of the block reads (attention's, which the MLP
    # reads) is fitted as though nothing responded to it, together with the others, so that none
    # adds what another can add better. In the second, the exact projections make up for the
    # response.
    exact = [projection for projection in projections if projection.exact]
    near = [projection for projection in projections if not projection.exact]
    together = [projection for projection in exact if projection.kind != "gain"] + near
    # Through a norm, a matrix W adds gain * W x / s for an input x, where s is the size of W x:
    # linear in W only for a fixed s. What a fit makes smaller, the norm makes larger again. So each
    # round fits W, then the gains, which is exact, and a last round fits both again with the new s.
    behind_norms = any(projection.norm for projection in exact)
    rounds = ([together] * bool(near) + [exact] * bool(exact) + [exact] * behind_norms)[:max_rounds]
    values: dict[str, Tensor] = {}
    fits: list[Fit] = []
    for fitted in rounds:
        result = fit(fitted, values)
        values, after = values | result.values, result.error_after
        for norm in (projection.norm for projection in fitted if projection.norm):
            gains = fit([norm], values)
            after = min(gains.error_before, gains.error_after)
            if gains.error_after < gains.error_before:
                values = values | gains.values
        fits.append(
            Fit(result.ridge, values, fits[0].error_before if fits else result.error_before, after)
        )
    # After the first of several rounds, how the rest of the block responds is not yet known.
    return min(fits[bool(near and exact and fits[1:]) :], key=lambda fit: fit.error_after)


def _weight_changes(
    projections: Sequence[ResidualProjection], fitted: Tensor, value_of: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for projection in projections:
        change = fitted[start : start + projection.inputs]
        start += len(change)
        if projection.norm:
            multipliers = (
                as_float64(value_of(f"{projection.norm.name}.weight")) + projection.norm.offset
            )
            # Infinity where a norm multiplies by next to nothing.
            silent = multipliers.abs() < MIN_GAIN_SHARE * multipliers.abs().mean()
            change = change / multipliers.masked_fill(silent, torch.inf).to(change.device)
        yield f"{projection.name}.weight", change.T if projection.kind == "matrix" else change
    # One constant is enough: all projections add to the same hidden states.
    for projection in [projection for projection in projections if projection.takes_bias][:1]:
        yield f"{projection.name}.bias", fitted[start]
