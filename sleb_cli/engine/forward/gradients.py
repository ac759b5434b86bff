"""Gradients of the calibration loss with respect to blocks' weights, for one block at a time.

One forward pass keeps what enters each block. Then the blocks are taken from the last to the first: for each batch, the
gradient of a block's output is backpropagated through that block, on the kept input, to its weights and to its input,
which is the output of the block below. So at most one block's gradients exist at a time, and the graph of one block on
one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from sleb_cli.engine.device import translate_out_of_memory
from sleb_cli.engine.forward.logits import position_slices, score_logits, score_positions
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def blocks_with_gradients(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    """Yield each of `blocks` while its parameters hold the gradients of the mean loss in `.grad`.

    The loss is that of the model without the removed blocks: the mean over sequences of the mean over the tokens that
    count, in nats. If the family's blocks cannot be run alone, all gradients exist together.

    Raises:
        OutOfMemory: the gradients do not fit into memory.
    """
    model = passes.skippable.model
    model.requires_grad_(False)
    yield_blocks = _one_by_one if passes.engine == "fork" else _all_together
    message = f"Gradients do not fit into the memory of {model.device}."
    try:
        with translate_out_of_memory(message, "Use a smaller --batch-size, fewer --samples, or --device cpu."):
            yield from yield_blocks(passes, removed, blocks)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


def _all_together(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    skippable = passes.skippable
    for block in blocks:
        for parameter in _weights(skippable, block):
            parameter.requires_grad_(True)
    for batch, ids in enumerate(passes.batches):
        losses = score_logits(
            NegativeLogLikelihood(), skippable.logits(ids, removed), ids, loss_mask=_loss_mask(passes, batch)
        )
        (losses.sum() / _sequences(passes)).backward()  # type: ignore[no-untyped-call]
    yield from blocks


def _one_by_one(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    skippable = passes.skippable
    with torch.no_grad():
        calls = [skippable.calls(ids) for ids in passes.batches]
        entering = [list(skippable.run_blocks(of_batch, of_batch[0].entering, removed)) for of_batch in calls]
    gradients = [_gradient_of_head(passes, batch, states.pop()) for batch, states in enumerate(entering)]
    for block in reversed(range(min(blocks), len(skippable.switches))):
        inputs = [states.pop() for states in entering]
        if block in removed:
            continue
        # Sums over many batches are kept in float32, whatever the weights' data type.
        parameters = _weights(skippable, block) if block in blocks else []
        sums = {p.requires_grad_(True): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
        for batch, hidden in enumerate(inputs):
            gradients[batch] = _backpropagate(skippable, calls[batch][block], hidden, gradients[batch])
            for parameter, total in sums.items():
                if parameter.grad is not None:
                    total += parameter.grad.float()
                    parameter.grad = None
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)
        if block in blocks:
            yield block
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


def _gradient_of_head(passes: Passes, batch: int, hidden: Tensor) -> Tensor:
    """Return the loss's gradient with respect to the last block's output, computed a slice of logits at a time."""
    ids, loss_mask = passes.batches[batch], _loss_mask(passes, batch)
    counts = torch.ones_like(ids, dtype=torch.bool)[:, 1:] if loss_mask is None else loss_mask[:, 1:]
    weights = counts / counts.sum(1, keepdim=True) / _sequences(passes)
    leaf = hidden.detach().clone().requires_grad_()
    for part in position_slices(ids, passes.budget.positions):
        logits = passes.skippable.head(leaf[:, part], ids[:, part])
        losses = score_positions(NegativeLogLikelihood(), logits, ids[:, 1:][:, part], None)
        (losses * weights[:, part]).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _backpropagate(skippable: SkippableModel, call: Call, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a block's input, given that of its output; its parameters' gradients stay in them."""
    leaf = hidden.detach().clone().requires_grad_()
    skippable.run_block(call, leaf).backward(gradient)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _weights(skippable: SkippableModel, block: int) -> list[Tensor]:
    """Return the parameters of a block that can have a gradient."""
    return [p for p in skippable.switches[block].block.parameters() if p.is_floating_point()]


def _loss_mask(passes: Passes, batch: int) -> Tensor | None:
    return passes.loss_mask[batch] if passes.loss_mask else None


def _sequences(passes: Passes) -> int:
    return sum(len(batch) for batch in passes.batches)
