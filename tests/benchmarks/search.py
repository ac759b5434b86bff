"""How much faster the search of `sleb` is than the plain algorithm, in one run on the same data.

    python tests/benchmarks/search.py MODEL TEXT [--samples 16] [--length 512] [--remove 2] [--fast] [--plain-steps 1]

With --fast, a candidate is scored no longer once it is clearly behind.

The plain algorithm (`tests/reference.py`) runs one sequence and one candidate at a time through the whole model without
the candidate. If it runs fewer steps than the search, its remaining time is estimated from the block passes left. A
block pass is one sequence through one block, a head pass one sequence through the head. Peak memory is the largest
resident size of the process during the search, less the size before it (the model).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saved_work import calibrated, greedy_search, parser

from reference import plain_search
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.events import ignore


class Side:
    """Seconds per step, passes and peak memory of one of the two algorithms."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes = 0
        self.block_passes = 0
        self.head_passes = 0.0


def main() -> None:
    sizes = {"samples": 16, "length": 512, "remove": 2, "plain_steps": int, "seed": 0}
    options = parser(__doc__, "model", "text", **sizes, fast=False, dtype="bfloat16").parse_args()

    model, blocks, calibration = calibrated(options, options.text, options.dtype)
    sequences = (calibration.shuffled() if options.fast else calibration).sequences
    count, steps = len(blocks), options.remove
    print(f"{len(sequences)} x {options.length} tokens, {steps} of {count} blocks, {options.dtype}", flush=True)

    ours, our_removals = search(model, blocks, sequences, steps, fast=options.fast)
    show("ours", ours, our_removals)

    plain_steps = options.plain_steps or steps
    plain, removed = search_plainly(model, blocks, calibration.sequences, plain_steps)
    head_passes = [(count - 2 - step) * len(sequences) for step in range(steps)]
    block_passes = [head_passes[step] * (count - 1 - step) for step in range(steps)]
    plain.block_passes, plain.head_passes = sum(block_passes), sum(head_passes)
    show("plain", plain, removed)
    print(f"        removals {'agree' if our_removals[:plain_steps] == removed else 'DIFFER'}", flush=True)

    first, first_of_ours = sum(plain.seconds), sum(ours.seconds[:plain_steps])
    whole = first * sum(block_passes) / sum(block_passes[:plain_steps])
    print(f"ratio   {first / first_of_ours:.2f}x in time over the first {plain_steps} steps")
    print(f"        {whole / sum(ours.seconds):.2f}x over all {steps}, plain at {whole:.0f} s by its passes")
    print(
        f"        {plain.block_passes / ours.block_passes:.2f}x in block passes, "
        f"{plain.head_passes / ours.head_passes:.2f}x in head passes, "
        f"{plain.bytes / max(1, ours.bytes):.2f}x in peak memory beside the model"
    )


def search(
    model: Any, blocks: nn.ModuleList, sequences: torch.Tensor, remove: int, *, fast: bool = False
) -> tuple[Side, list[int]]:
    """Run our search as `sleb search` does, and count its passes."""
    removals = []
    with measured() as side, SkippableModel(model, blocks) as skippable:
        count_passes(skippable, side, sequences.shape[1])
        start = time.perf_counter()
        passes, reason = prepare_passes(skippable, sequences, ignore, min_batches=LOOKS if fast else 1)
        assert reason is None, reason
        for choice in greedy_search(passes, remove, fast=fast):
            removals.append(choice.block)
            side.seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return side, removals


def search_plainly(model: Any, blocks: nn.ModuleList, sequences: torch.Tensor, remove: int) -> tuple[Side, list[int]]:
    """Run the plain algorithm."""
    removed: list[int] = []
    with measured() as side:
        for size in range(1, remove + 1):
            start = time.perf_counter()
            removed, _ = plain_search(model, blocks, sequences, size, removed=removed)
            side.seconds.append(time.perf_counter() - start)
    return side, removed


def count_passes(skippable: SkippableModel, side: Side, length: int) -> None:
    """Add every call of a block and of the head to the passes of a side."""
    run_block, head = skippable.run_block, skippable.head

    def counted_block(call: Any, hidden: torch.Tensor) -> torch.Tensor:
        side.block_passes += len(hidden)
        return run_block(call, hidden)

    def counted_head(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        side.head_passes += ids.numel() / (length - 1)
        return head(hidden, ids)

    skippable.run_block, skippable.head = counted_block, counted_head  # type: ignore[method-assign]


@contextmanager
def measured() -> Iterator[Side]:
    """Record the peak of the process's resident bytes, less those before, as Linux counts them."""
    side = Side()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    yield side
    side.bytes = resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def show(name: str, side: Side, removals: list[int]) -> None:
    seconds = " + ".join(f"{step:.0f}" for step in side.seconds)
    print(f"{name:7} removes {removals} in {sum(side.seconds):.1f} s ({seconds})")
    print(
        f"        {side.block_passes:,} block passes, {side.head_passes:,.0f} head passes, "
        f"{side.bytes / 1e6:.0f} MB at most",
        flush=True,
    )


if __name__ == "__main__":
    main()
