"""How much memory a search may use in addition to the model, and the batches that fit into it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sleb_cli.engine.device import free_bytes_per_process
from sleb_cli.engine.model.padded import Tokens, usual_length
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.units import format_bytes
from sleb_plugins import MachineError

if TYPE_CHECKING:
    from sleb_cli.engine.forward.memory_needs import Footprint


@dataclass(frozen=True)
class DeviceSettings:
    """Batch and memory settings of a kind of device; the defaults suit a CPU and Apple's GPU alike.

    Attributes:
        head_positions: positions whose logits exist at once, in the model's data type.
        widened_bytes: bytes of logits that are widened to float32 at a time; on a CPU, as many as
            stay in its caches.
        tokens_per_batch: enough to fill its matrix units, few enough to stay in a CPU's caches.
        min_tokens_per_batch: fewer use it badly, so a race looks less often instead.
        share: of its free memory. Where other programs use the same memory, half of it: never swap.
    """

    head_positions: int
    widened_bytes: int
    tokens_per_batch: int = 2048
    min_tokens_per_batch: int = 256
    share: float = 0.5


CPU_SETTINGS = DeviceSettings(head_positions=256, widened_bytes=2 << 20)
MPS_SETTINGS = DeviceSettings(head_positions=512, widened_bytes=256 << 20)
ACCELERATOR_SETTINGS = DeviceSettings(
    tokens_per_batch=8192,
    min_tokens_per_batch=2048,
    head_positions=2048,
    widened_bytes=256 << 20,
    share=0.9,
)

MIN_POSITIONS = 16
"""Logits of at least this many positions exist at once; if memory is short, batches get fewer
sequences instead.
"""


def settings_for(device: torch.device) -> DeviceSettings:
    """Return the settings for this device; accelerators with memory of their own share theirs."""
    if device.type == "cpu":
        return CPU_SETTINGS
    if device.type == "mps":
        return MPS_SETTINGS
    return ACCELERATOR_SETTINGS


@dataclass(frozen=True)
class MemoryBudget:
    """How a search fits into memory.

    Attributes:
        sequences: in a batch, the unit of arithmetic.
        positions: over all sequences of a batch, whose logits exist at once.
        branches: candidates that share a walk.
        kept_branches: of a batch, from step to step.
    """

    sequences: int
    positions: int
    branches: int
    kept_branches: int

    def halved(self) -> MemoryBudget | None:
        """Return a smaller budget, cut first where that costs least time; None if impossible."""
        # These two change no digit. Fewer positions at once, or fewer sequences in a batch, can
        # change the last bits.
        if self.kept_branches or self.branches > 1:
            return dataclasses.replace(self, kept_branches=0, branches=max(1, self.branches // 2))
        if self.positions > MIN_POSITIONS:
            return dataclasses.replace(self, positions=max(MIN_POSITIONS, self.positions // 2))
        if self.sequences > 1:
            return dataclasses.replace(self, sequences=self.sequences // 2)
        return None


def resolve_memory_budget(
    available: int,
    footprint: Footprint,
    sequences: Tokens,
    candidates: int,
    batch_size: int | None = None,
    min_batches: int = 1,
) -> MemoryBudget:
    """Fit a search on sequences, [sequences, positions], into `available` bytes on their device.

    Unless the user chose a batch size, there are at least `min_batches` batches, as far as they
    keep a useful size.
    """
    settings = settings_for(sequences.device)
    count, length = sequences.shape
    size = batch_size
    if size is None:
        usual = usual_length(sequences)
        size = max(settings.min_tokens_per_batch // usual, count // min_batches)
        size = max(1, min(size, settings.tokens_per_batch // usual))
    size = min(size, count)
    budget = MemoryBudget(size, settings.head_positions, branches=1, kept_branches=0)
    while True:
        needed = footprint.working_bytes(
            budget.sequences * length, budget.positions, settings.widened_bytes
        )
        if needed <= available:
            break
        smaller = budget.halved()
        if smaller is None or (batch_size is not None and smaller.sequences < size):
            raise MachineError(
                f"{budget.sequences} sequences of {length} tokens need {format_bytes(needed)} in "
                f"addition to the model, but only {format_bytes(available)} may be used.",
                hint="Use a smaller --batch-size or --sequence-length, a narrower --dtype, or a "
                "larger --memory.",
            )
        budget = smaller
    spare = (available - needed) // (budget.sequences * length * footprint.branch)
    branches = max(1, min(candidates, 1 + spare))
    batches = -(-count // budget.sequences)
    # While a step's branches are computed, the kept branches of the step before are still there.
    kept_branches = (spare - branches + 1) // batches // 2
    return dataclasses.replace(budget, branches=branches, kept_branches=kept_branches)


def available_memory(
    device: torch.device, group: ProcessGroup | None = None, limit: int | None = None
) -> int:
    """Return the bytes to use besides the model: `limit`, or else a share of the free memory."""
    usable = limit or int(free_bytes_per_process(device) * settings_for(device).share)
    if group is None:
        return usable
    return min(group.gather(usable))  # so that all processes have the same batches
