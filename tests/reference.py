"""SLEB as plainly as it can be said: one sequence, one candidate at a time, hooks only. Nothing of sleb in here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def plain_loss(model: Any, blocks: nn.ModuleList, sequences: Tensor, skipped: set[int]) -> float:
    """Give the mean over sequences of the mean cross entropy, with these blocks handing their input on."""

    def hand_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden

    handles = [blocks[index].register_forward_hook(hand_on, with_kwargs=True) for index in skipped]
    try:
        losses = []
        for sequence in sequences:
            logits = model(sequence[None], use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, sequence[1:]).double())
        return float(torch.stack(losses).mean())
    finally:
        for handle in handles:
            handle.remove()


def plain_search(
    model: Any, blocks: nn.ModuleList, sequences: Tensor, remove: int
) -> tuple[list[int], list[dict[int, float]]]:
    """Give the removals in order, and each step's loss of every candidate; first and last block are protected."""
    removed: list[int] = []
    steps = []
    for _ in range(remove):
        remaining: Sequence[int] = [index for index in range(len(blocks)) if index not in removed]
        losses = {index: plain_loss(model, blocks, sequences, {*removed, index}) for index in remaining[1:-1]}
        removed.append(min(losses, key=lambda index: (losses[index], index)))
        steps.append(losses)
    return removed, steps
