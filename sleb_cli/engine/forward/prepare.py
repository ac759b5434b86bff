"""Fit the passes of a search or an evaluation into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.fork_check import why_not_fork
from sleb_cli.engine.forward.memory_budget import (
    available_memory,
    resolve_memory_budget,
    settings_for,
)
from sleb_cli.engine.forward.memory_needs import Footprint, measure_footprint
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.stores import keep_on_device, to_cpu
from sleb_cli.engine.model.padded import Tokens, split
from sleb_cli.events import Notify
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError, UnsupportedModelError

# Held by a streamed step besides the candidates': the input of the first block, the base where the
# next group starts, the base, and the dense model's or one that is kept.
OTHER_BRANCHES = 4


def prepare_passes(
    skippable: SkippableModel,
    sequences: Tokens,
    notify: Notify,
    *,
    loss_mask: Tensor | None = None,
    memory: Callable[[torch.device], int] = available_memory,
    batch_size: int | None = None,
    min_batches: int = 1,
    checked: int | None = None,
    walks_together: bool = False,
) -> tuple[Passes, str | None]:
    """Fit the passes over `sequences`, [sequences, positions], into memory.

    Also returns why walks are not shared.

    `loss_mask`, of that shape, is as of `Passes`, and `memory` returns the bytes that may be used
    on a device in addition to the model. The fork is checked on `checked` tokens of a sequence.
    With `walks_together`, all sequences go through each streamed block together, so that all their
    states exist.
    """
    with torch.inference_mode():
        # CANINE reads four letters at once.
        footprint = measure_footprint(skippable, sequences[:1, :8])
        devices = dict.fromkeys(
            [skippable.device, *skippable.places]
        )  # in the same order in all processes
        available = min(memory(device) for device in devices)
        candidates = len(skippable.switches)
        budget = resolve_memory_budget(
            available, footprint, sequences, candidates, batch_size, min_batches
        )
        reason = why_not_fork(skippable, sequences[: budget.sequences, :checked])
    if reason and batch_size is None:  # all logits of a batch exist together
        fitting = available // 4 // (sequences.shape[1] * footprint.logits)
        budget = replace(budget, sequences=max(1, min(budget.sequences, fitting)))
    batches = split(sequences, budget.sequences)
    masks = None
    if loss_mask is not None:
        masks = torch.split(loss_mask, budget.sequences)
    passes = Passes(skippable, batches, budget, notify, forks=reason is None, loss_mask=masks)
    if skippable.weights.resident:
        return passes, reason
    if reason:
        raise UnsupportedModelError(
            f"{skippable.model.config.model_type} cannot be streamed: {reason}.",
            hint="Use a machine with more memory.",
        )
    if walks_together:
        passes = _store_all(passes, footprint, available, memory)
    return passes, None


def _store_all(
    passes: Passes, footprint: Footprint, available: int, memory: Callable[[torch.device], int]
) -> Passes:
    """Choose where the hidden states of sequences and branches wait, and how many are kept."""
    # If all candidates' states do not fit into memory, a step goes through the model with a group
    # of them at a time.
    device = passes.skippable.device
    count = len(passes.skippable.switches)
    branch_bytes = sum(batch.numel() for batch in passes.batches) * footprint.branch
    widened = settings_for(device).widened_bytes
    largest = passes.batches[0].numel()
    room = available - footprint.working_bytes(largest, passes.budget.positions, widened)
    store = keep_on_device
    if device != CPU and room < (count + OTHER_BRANCHES) * branch_bytes:
        store = to_cpu
        room = memory(CPU)
    branches = room // branch_bytes - OTHER_BRANCHES
    if branches < 1:
        needed = format_bytes((1 + OTHER_BRANCHES) * branch_bytes)
        raise MachineError(
            f"The hidden states of all sequences need {needed}, but only "
            f"{format_bytes(max(0, room))} may be used.",
            hint="Use fewer --samples, a smaller --sequence-length, or a larger --memory.",
        )
    to_keep = 0
    if branches >= count:
        to_keep = 1 + (branches - count) // 2
    budget = replace(passes.budget, branches=min(branches, count), kept_branches=to_keep)
    return replace(passes, store=store, budget=budget)
