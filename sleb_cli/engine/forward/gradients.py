"""Gradients of the calibration loss with respect to blocks' weights, for one block at a time.

One forward pass keeps what enters each block, or every few blocks if memory is short. Then the blocks are taken from
the last to the first: for each batch, the gradient of a block's output is backpropagated through that block, on the
kept input, to its weights and to its input, which is the output of the block below. So at most one block's gradients
exist at a time, and the graph of one block on one batch. Gradients in float16 are scaled from block to block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb_cli.engine.device import translate_out_of_memory
from sleb_cli.engine.forward.fork import Walk, walk_together
from sleb_cli.engine.forward.logits import position_slices, score_logits, score_positions
from sleb_cli.engine.forward.loss_scale import largest_in_range, starting_scale, without_overflow
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.states import BASE, States
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def blocks_with_gradients(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    """Yield each of `blocks` while its parameters, in float32, hold the gradients of the mean loss in `.grad`.

    The loss is that of the model without the removed blocks: the mean over sequences of the mean over the tokens that
    count, in nats. If the family's blocks cannot be run alone, all gradients exist together.

    Raises:
        OutOfMemory: the gradients do not fit into memory.
    """
    model = passes.skippable.model
    model.requires_grad_(False)
    yield_blocks = _one_by_one if passes.forks else _all_together
    message = f"Gradients do not fit in the memory of {passes.skippable.device}."
    try:
        with translate_out_of_memory(message, "Use a smaller --batch-size, fewer --samples, or --device cpu."):
            yield from yield_blocks(passes, removed, blocks)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


def _all_together(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    skippable = passes.skippable
    sums = {block: _Sums(_weights(skippable, block)) for block in blocks}
    parameters = [parameter for of_block in sums.values() for parameter in of_block.totals]
    scale = starting_scale(skippable.model.dtype, passes.batches[0].shape[1] * _sequences(passes))
    for batch, ids in enumerate(passes.batches):

        def backward(scale: float, batch: int = batch, ids: Tensor = ids) -> None:
            logits = skippable.logits(ids, removed)
            losses = score_logits(NegativeLogLikelihood(), logits, ids, loss_mask=_loss_mask(passes, batch))
            torch.autograd.backward(scale * losses.sum() / _sequences(passes))

        scale = without_overflow(backward, parameters, scale)
        for of_block in sums.values():
            of_block.take(scale)
    for block in blocks:
        with sums[block].shown():
            yield block


def _one_by_one(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    skippable, count = passes.skippable, len(passes.skippable.switches)
    inputs = _Inputs(passes, removed)
    gradients = [_gradient_of_head(passes, batch, hidden) for batch, hidden in enumerate(inputs.of(count))]
    kept = [block for block in range(min(blocks), count) if block not in removed]
    for block in skippable.weights.visit(reversed(kept)):
        sums = _Sums(_weights(skippable, block) if block in blocks else [])
        for batch, hidden in enumerate(inputs.of(block)):
            call = inputs.calls[batch][block]
            gradients[batch] = _backpropagate(skippable, call, hidden, gradients[batch], sums)
        if block in blocks:
            with sums.shown():
                yield block


class _Inputs:
    """What enters each block, batch by batch: kept at every `stride`-th depth, and computed again in between.

    (Chen et al., arXiv 1604.06174, section 4.) The stride is the least whose states fit into the memory allowed.

    Raises:
        MachineError: with no stride they fit.
    """

    def __init__(self, passes: Passes, removed: Collection[int]) -> None:
        self._skippable, self._removed = passes.skippable, removed
        self.calls = [self._skippable.calls(ids) for ids in passes.batches]
        self._states = [States() for _ in self.calls]
        depths = len(self._skippable.switches)
        one_depth = sum(calls[0].entering.nbytes for calls in self.calls)
        self._stride = _stride(depths, one_depth, passes.available)
        self._run(depths, range(0, depths, self._stride))

    def of(self, depth: int) -> list[Tensor]:
        """Return what enters the block at a depth, or leaves the last one; the deepest is asked for first."""
        if BASE not in self._states[0].at[depth]:
            self._run(depth, range(depth - depth % self._stride, depth))
        return [states.at.pop(depth)[BASE] for states in self._states]

    @torch.no_grad()
    def _run(self, end: int, keep: Iterable[int]) -> None:
        """Run the blocks up to a depth from the deepest one that is known; keep what enters there, and at `keep`."""
        depths = {depth: 1 for depth in keep if depth not in self._removed}
        walks = [
            Walk(self._skippable, calls[:end], states, self._removed, (), keep=depths)
            for calls, states in zip(self.calls, self._states, strict=True)
        ]
        for _ in walk_together(self._skippable, walks):
            pass
        for walk in walks:
            walk.states.at[end][BASE] = walk.branches[BASE]


def _stride(depths: int, one_depth: int, available: int) -> int:
    """Return how far apart states are kept: together with one stretch between, and with gradients, they must fit."""
    needed = {stride: (-(-depths // stride) + stride - 1 + 2) * one_depth for stride in range(1, depths + 1)}
    fitting = [stride for stride, size in needed.items() if size <= available]
    if not fitting:
        raise MachineError(
            f"Gradients need {format_bytes(min(needed.values()))} in addition to the model, "
            f"but only {format_bytes(available)} may be used.",
            hint="Use fewer --samples, a smaller --sequence-length, or a larger --memory.",
        )
    return fitting[0]


@dataclass(frozen=True)
class _Scaled:
    """A gradient in the model's data type, times `scale`."""

    values: Tensor
    scale: float


class _Sums:
    """The gradients of some parameters, summed over many batches in float32, whatever the parameters' data type."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.totals = {p.requires_grad_(True): torch.zeros_like(p, dtype=torch.float32) for p in parameters}

    def take(self, scale: float) -> None:
        """Add the parameters' gradients, which are `scale` times too large, and reset them."""
        for parameter, total in self.totals.items():
            if parameter.grad is not None:
                total += parameter.grad.float() / scale
                parameter.grad = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the parameters hold the sums in `.grad`, and their values in float32, since a gradient has their type."""
        own = {parameter: parameter.data for parameter in self.totals}
        try:
            for parameter, total in self.totals.items():
                parameter.data, parameter.grad = parameter.data.float(), total
            yield
        finally:
            for parameter, values in own.items():
                parameter.grad = None
                parameter.data = values
                parameter.requires_grad_(False)


def _gradient_of_head(passes: Passes, batch: int, hidden: Tensor) -> _Scaled:
    """Return the loss's gradient with respect to the last block's output, computed a slice of logits at a time."""
    ids, loss_mask = passes.batches[batch], _loss_mask(passes, batch)
    counts = torch.ones_like(ids, dtype=torch.bool)[:, 1:] if loss_mask is None else loss_mask[:, 1:]
    weights = counts / counts.sum(1, keepdim=True) / _sequences(passes)
    leaf = hidden.detach().clone().requires_grad_()

    def backward(scale: float) -> None:
        for part in position_slices(ids, passes.budget.positions):
            logits = passes.skippable.head(leaf[:, part], ids[:, part])
            losses = score_positions(NegativeLogLikelihood(), logits, ids[:, 1:][:, part], None)
            torch.autograd.backward(scale * (losses * weights[:, part]).sum())

    scale = without_overflow(backward, [leaf], starting_scale(hidden.dtype, ids.shape[1] * _sequences(passes)))
    assert leaf.grad is not None
    return _Scaled(leaf.grad, scale)


def _backpropagate(skippable: SkippableModel, call: Call, hidden: Tensor, gradient: _Scaled, sums: _Sums) -> _Scaled:
    """Return the gradient of a block's input, given that of its output; add those of its parameters to `sums`."""
    leaf = hidden.detach().clone().requires_grad_()
    leaving = skippable.run_block(call, leaf)

    def backward(factor: float) -> None:
        torch.autograd.backward(leaving, gradient.values * factor, retain_graph=is_scaled)

    is_scaled = leaving.dtype is torch.float16
    factor = without_overflow(backward, [leaf, *sums.totals], largest_in_range(gradient.values))
    sums.take(gradient.scale * factor)
    assert leaf.grad is not None
    return _Scaled(leaf.grad, gradient.scale * factor)


def _weights(skippable: SkippableModel, block: int) -> list[Tensor]:
    """Return the parameters of a block that can have a gradient."""
    return [p for p in skippable.switches[block].block.parameters() if p.is_floating_point()]


def _loss_mask(passes: Passes, batch: int) -> Tensor | None:
    return passes.loss_mask[batch] if passes.loss_mask else None


def _sequences(passes: Passes) -> int:
    return sum(len(batch) for batch in passes.batches)
