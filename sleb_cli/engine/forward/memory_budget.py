"""How much memory a search may take beside the model, and what follows from it.

None of it changes a number as long as a batch keeps its sequences: rows share a walk or follow one another, states are
kept or computed again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from sleb_cli.engine.device import free_bytes
from sleb_plugins import MachineError, UsageError

# Tokens in a batch: enough to fill a device's matrix units, few enough to stay in a CPU's caches.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192, "mps": 2048}

# Positions whose logits exist at once, in the model's data type.
HEAD_POSITIONS = {"cpu": 256, "cuda": 2048, "mps": 512}

# Of the memory that is free. On a CPU, the other half is for the page cache and other programs: never swap.
SHARE = {"cpu": 0.5, "cuda": 0.9, "mps": 0.5}


@dataclass(frozen=True)
class Footprint:
    """What one token takes, in bytes: a row of hidden states, passing through a block, and its logits."""

    branch: int
    block: int
    logits: int


@dataclass(frozen=True)
class MemoryBudget:
    """How a search fits into memory.

    Attributes:
        sequences: sequences in a batch, the unit of arithmetic.
        positions: positions of a sequence times sequences whose logits exist at once.
        rows: candidates that share a walk.
        kept: rows of a batch that are remembered from step to step.
    """

    sequences: int
    positions: int
    branches: int
    kept: int

    def halved(self) -> MemoryBudget | None:
        """Take less, beginning with what costs the least time; None where nothing is left to give."""
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
    looks: int = 1,
) -> MemoryBudget:
    """Fit a search into `available` bytes; `batch` is the number of sequences in a batch where the user chose it.

    Otherwise there are `looks` batches or more, as far as there are sequences.

    Raises:
        MachineError: not even one candidate on one sequence fits.
    """
    positions = HEAD_POSITIONS[device]
    size = min(batch or max(1, min(TOKENS_PER_BATCH[device] // length, sequences // looks)), sequences)

    def needed(size: int, positions: int) -> int:
        # The base row, a candidate's and what it becomes; one block at work; a chunk of logits, and its score.
        return size * length * (3 * footprint.branch + footprint.block) + positions * footprint.logits

    while needed(size, positions) > available and (positions > 16 or (size > 1 and batch is None)):
        if positions > 16:
            positions //= 2
        else:
            size //= 2
    if needed(size, positions) > available:
        raise MachineError(
            f"A search needs {_readable(needed(size, positions))} beside the model, "
            f"and may take {_readable(available)}.",
            hint="Raise --memory, or take a smaller --batch-size or --sequence-length.",
        )
    branch = size * length * footprint.branch
    spare = (available - needed(size, positions)) // branch
    branches = max(1, min(candidates, 1 + spare))
    batches = -(-sequences // size)
    # While a step's rows come to be known, those of the step before are still there.
    return MemoryBudget(
        sequences=size, positions=positions, branches=branches, kept=(spare - branches + 1) // batches // 2
    )


def available_memory(device: torch.device, asked: str | None) -> int:
    """Give the bytes that a search may take beside the model: what the user said, or a share of what is free.

    Raises:
        UsageError: `asked` is no amount of memory.
    """
    if asked is not None:
        return parse_bytes(asked)
    return int(free_bytes(device) * SHARE[device.type])


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Read "8GiB", "500 MB" or a number of bytes, as `option` has it.

    Raises:
        UsageError: it is no amount of memory above 0.
    """
    try:
        count = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        count = 0
    if count <= 0:
        raise UsageError(f"{option} {text} is no amount of memory.", hint="Write it like 8GiB or 500MB.")
    return count


def _readable(count: int) -> str:
    return ByteSize(count).human_readable(decimal=True, separator=" ")
