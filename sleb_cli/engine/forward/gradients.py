"""Gradients of the calibration loss with respect to blocks' weights, those of one block at a time.

The model is run once, and what enters each block is kept. Then the blocks are taken from the top: the gradient that
comes down to a block goes through it, on the input that it had, for all batches, and leaves the gradients of its
weights and the one that goes on to the block below. So there are never more gradients than one block has weights, and
no more of the graph than one block on one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from sleb_cli.engine.device import OutOfMemory, memory_ended
from sleb_cli.engine.forward.logits import score_logits, score_positions
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def blocks_with_gradients(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
    """Give each of `blocks` while the gradients of the mean loss lie in the `.grad` of its parameters.

    The loss is that of the model without the removed blocks: the mean over sequences of the mean over their tokens that
    count, in nats. Where the family's blocks cannot be run on their own, all gradients exist at once.
    """
    passes.skippable.model.requires_grad_(False)
    way = _one_by_one if passes.engine == "fork" else _all_at_once
    try:
        yield from way(passes, removed, blocks)
    except RuntimeError as error:
        if not memory_ended(error):
            raise
        raise OutOfMemory(
            f"Gradients do not fit into the memory of {passes.skippable.model.device}.",
            hint="Take a smaller --batch-size or fewer --samples, or --device cpu.",
        ) from error
    finally:
        passes.skippable.model.zero_grad(set_to_none=True)
        passes.skippable.model.requires_grad_(False)


def _all_at_once(passes: Passes, removed: Collection[int], blocks: Sequence[int]) -> Iterator[int]:
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
        entering = [_climb(skippable, of_batch, removed) for of_batch in calls]
    coming_down = [_of_the_head(passes, batch, states.pop()) for batch, states in enumerate(entering)]
    for block in reversed(range(min(blocks), len(skippable.switches))):
        inputs = [states.pop() for states in entering]
        if block in removed:
            continue
        # Sums over many batches are kept in float32, whatever the weights are.
        parameters = _weights(skippable, block) if block in blocks else []
        sums = {p.requires_grad_(True): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
        for batch, hidden in enumerate(inputs):
            coming_down[batch] = _through(skippable, calls[batch][block], hidden, coming_down[batch])
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


def _climb(skippable: SkippableModel, calls: Sequence[Call], removed: Collection[int]) -> list[Tensor]:
    """Give what enters each block, and last what leaves the last one; a block that is gone hands its input on."""
    states = [calls[0].entering]
    for call in calls:
        states.append(states[-1] if call.block in removed else skippable.run_block(call, states[-1]))
    return states


def _of_the_head(passes: Passes, batch: int, hidden: Tensor) -> Tensor:
    """Give the loss's gradient with respect to what leaves the last block, with a chunk of logits at a time."""
    ids, loss_mask = passes.batches[batch], _loss_mask(passes, batch)
    counts = torch.ones_like(ids, dtype=torch.bool)[:, 1:] if loss_mask is None else loss_mask[:, 1:]
    weights = counts / counts.sum(1, keepdim=True) / _sequences(passes)
    leaf = hidden.detach().clone().requires_grad_()
    step = max(1, passes.budget.positions // len(ids))
    for start in range(0, ids.shape[1] - 1, step):
        part = slice(start, min(start + step, ids.shape[1] - 1))
        logits = passes.skippable.head(leaf[:, part], ids[:, part])
        losses = score_positions(NegativeLogLikelihood(), logits, ids[:, 1:][:, part], None)
        (losses * weights[:, part]).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _through(skippable: SkippableModel, call: Call, hidden: Tensor, coming_down: Tensor) -> Tensor:
    """Take a gradient down through one block; its parameters' gradients stay in them."""
    leaf = hidden.detach().clone().requires_grad_()
    skippable.run_block(call, leaf).backward(coming_down)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _weights(skippable: SkippableModel, block: int) -> list[Tensor]:
    """Give the parameters of a block that can have a gradient."""
    return [p for p in skippable.switches[block].block.parameters() if p.is_floating_point()]


def _loss_mask(passes: Passes, batch: int) -> Tensor | None:
    return passes.loss_mask[batch] if passes.loss_mask else None


def _sequences(passes: Passes) -> int:
    return sum(len(batch) for batch in passes.batches)
