"""SLEB in its plainest form: one sequence and one candidate at a time. Imports nothing of sleb."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def plain_loss(
    model: Any, blocks: nn.ModuleList, sequences: Tensor, skipped: set[int], kinds: Any = None
) -> float:
    """Return the mean over sequences of the mean cross entropy, with these blocks returning their
    input.
    """
    kinds = kinds or output_kinds(model, blocks, sequences, use_cache=False)
    before = {index: vars(blocks[index]).pop("forward", None) for index in skipped}
    try:
        for index in skipped:
            blocks[index].forward = passing_through(*kinds[index])
        losses = []
        for sequence in sequences:
            logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, sequence[1:]).double())
        return float(torch.stack(losses).mean())
    finally:
        for index in skipped:
            del blocks[index].forward
            if before[index] is not None:
                blocks[index].forward = before[index]


@torch.no_grad()
def output_kinds(
    model: Any, blocks: nn.ModuleList, sequences: Tensor, **options: Any
) -> list[tuple[type, int]]:
    """Return what each block returns: its type, and the length of a tuple or list."""
    kinds: dict[int, tuple[type, int]] = {}

    def record(index: int, output: Any) -> None:
        kinds[index] = type(output), len(output)

    handles = [
        block.register_forward_hook(lambda block, args, output, index=index: record(index, output))
        for index, block in enumerate(blocks)
    ]
    model(sequences[:1, :8], **options)
    for handle in handles:
        handle.remove()
    return [kinds[index] for index in range(len(blocks))]


def passing_through(kind: type, length: int) -> Any:
    """Return a `forward` that returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if issubclass(kind, Tensor) else kind([hidden, *[None] * (length - 1)])

    return forward


def plain_search(
    model: Any,
    blocks: nn.ModuleList,
    sequences: Tensor,
    remove: int,
    *,
    removed: Sequence[int] = (),
) -> tuple[list[int], list[dict[int, float]]]:
    """Return the removals in order, and the loss of every candidate per step; protects the first
    and last block.
    """
    gone = list(removed)
    kinds = output_kinds(model, blocks, sequences, use_cache=False)
    steps = []
    while len(gone) < remove:
        remaining: Sequence[int] = [index for index in range(len(blocks)) if index not in gone]
        losses = {}
        for index in remaining[1:-1]:
            losses[index] = plain_loss(model, blocks, sequences, {*gone, index}, kinds)
        gone.append(min(losses, key=lambda index: (losses[index], index)))
        steps.append(losses)
    return gone, steps


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Return the summed log-probability of what follows a prompt."""
    given = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + continuation).input_ids])
    scores = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(1, ids[0, 1:, None])[given - 1 :].sum())
