"""How much memory a search may take beside the model, and what follows from it.

How many branches share a walk and how many states are kept changes no digit. Fewer sequences in a batch, or fewer
positions at once, can change the last bits, so they come last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from sleb_cli.engine.device import free_bytes
from sleb_cli.units import format_bytes, parse_bytes
from sleb_plugins import MachineError

# Tokens in a batch: enough to fill a device's matrix units, few enough to stay in a CPU's caches.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192, "mps": 2048}

# Fewer tokens use a device badly, so a race looks less often rather than make smaller batches.
MIN_TOKENS_PER_BATCH = {"cpu": 256, "cuda": 2048, "mps": 256}

# Positions whose logits exist at once, in the model's data type.
HEAD_POSITIONS = {"cpu": 256, "cuda": 2048, "mps": 512}

# The share of the free memory to use. On a CPU, the other half is for the page cache and other programs: never swap.
SHARE = {"cpu": 0.5, "cuda": 0.9, "mps": 0.5}


@dataclass(frozen=True)
class Footprint:
    """The bytes that one token takes: in a branch of hidden states, inside a block, and as logits."""

    branch: int
    block: int
    logits: int


@dataclass(frozen=True)
class MemoryBudget:
    """How a search fits into memory.

    Attributes:
        sequences: sequences in a batch, the unit of arithmetic.
        positions: how many positions' logits may exist at once, over all sequences of a batch.
        branches: candidates that share a walk.
        kept: branches of a batch that are kept from step to step.
    """

    sequences: int
    positions: int
    branches: int
    kept: int

    def halved(self) -> MemoryBudget | None:
        """Return a smaller budget, reduced first where it costs the least time; None if it cannot be smaller."""
        if self.kept or self.branches > 1:
            return dataclasses.replace(self, kept=0, branches=max(1, self.branches // 2))
        if self.positions > 16:
            return dataclasses.replace(self, positions=max(16, self.positions // 2))
        if self.sequences > 1:
            return dataclasses.replace(self, sequences=self.sequences // 2)
        return None


def resolve_memory_budget(
    available: int,
    footprint: Footprint,
    device: str,
    *,
    candidates: int,
    sequences: int,
    length: int,
    batch: int | None,
    min_batches: int = 1,
) -> MemoryBudget:
    """Fit a search into `available` bytes; `batch` is the number of sequences in a batch, if the user chose it.

    Otherwise there are at least `min_batches` batches, if there are enough sequences for batches of a useful size.

    Raises:
        MachineError: not even one candidate on one sequence fits.
    """
    positions = HEAD_POSITIONS[device]
    fewest, most = MIN_TOKENS_PER_BATCH[device] // length, TOKENS_PER_BATCH[device] // length
    size = min(batch or max(1, min(most, max(fewest, sequences // min_batches))), sequences)

    def needed(size: int, positions: int) -> int:
        # The base, a candidate's branch and its next states; the inside of a block; a slice of logits, and its scores.
        return size * length * (3 * footprint.branch + footprint.block) + positions * footprint.logits

    while needed(size, positions) > available and (positions > 16 or (size > 1 and batch is None)):
        if positions > 16:
            positions //= 2
        else:
            size //= 2
    if needed(size, positions) > available:
        raise MachineError(
            f"A search needs {format_bytes(needed(size, positions))} beside the model, "
            f"but may take only {format_bytes(available)}.",
            hint="Raise --memory, or use a smaller --batch-size or --sequence-length.",
        )
    branch = size * length * footprint.branch
    spare = (available - needed(size, positions)) // branch
    branches = max(1, min(candidates, 1 + spare))
    batches = -(-sequences // size)
    # While a step's branches are computed, those of the step before are still there.
    return MemoryBudget(
        sequences=size, positions=positions, branches=branches, kept=(spare - branches + 1) // batches // 2
    )


def available_memory(device: torch.device, asked: str | None) -> int:
    """Return the bytes that a search may take beside the model: `asked`, or else a share of what is free.

    Raises:
        UsageError: `asked` is not an amount of memory.
    """
    if asked is not None:
        return parse_bytes(asked, "--memory")
    return int(free_bytes(device) * SHARE[device.type])
