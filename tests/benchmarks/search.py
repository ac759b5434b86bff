"""How much faster the search of `sleb` is than the plain algorithm, in one run on the same data.

    python tests/benchmarks/search.py MODEL TEXT [--samples 16] [--length 512] [--remove 2] [--fast]
                                      [--plain-sequences 0]

With --fast, candidates race.

The plain algorithm (`tests/reference.py`) runs one sequence and one candidate at a time through the
whole model without the candidate. It runs one step on --plain-sequences (0: all), from which its
time is estimated: a step costs as many block passes as there are sequences, candidates and other
blocks, and a head pass for each candidate and sequence. A block pass is one sequence through one
block, a head pass one sequence through the head. The bound is the time of the matrix products of
our passes alone, in calls of the same size.
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import calibrated, parser

from reference import plain_search
from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.memory_budget import settings_for
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.events import ignore
from sleb_plugins.metrics.nll import NegativeLogLikelihood


class Side:
    """Seconds per step and passes of one of the two algorithms."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.block_passes = 0
        self.head_passes = 0.0


def main() -> None:
    sizes = {"samples": 16, "length": 512, "remove": 2, "plain_sequences": 0}
    options = parser(__doc__, "model", "text", **sizes, fast=False).parse_args()
    for line in report(options).values():
        print(line)


def report(options: Any) -> dict[str, str]:
    """Measure both; return the ratios in words."""
    model, blocks, calibration = calibrated(
        options.model, options.text, options.samples, options.length
    )
    sequences = (calibration.shuffled() if options.fast else calibration).sequences
    count, steps = len(blocks), options.remove
    print(
        f"{len(sequences)} x {options.length} tokens, {steps} of {count} blocks, {model.dtype}",
        flush=True,
    )

    ours, removals, batch = search(model, blocks, sequences, steps, fast=options.fast)
    show("ours", ours, removals)
    bound, head = bare_seconds(model, blocks, ours, batch)
    evaluations = sum((count - 2 - step) * len(sequences) for step in range(steps))

    timed = calibration.sequences[: options.plain_sequences or None]
    plain, start = Side(), time.perf_counter()
    removed, _ = plain_search(model, blocks, timed, 1)
    plain.seconds.append(time.perf_counter() - start)
    plain.head_passes = sum((count - 2 - step) * len(sequences) for step in range(steps))
    plain.block_passes = sum(
        (count - 2 - step) * (count - 1 - step) * len(sequences) for step in range(steps)
    )
    show("plain", plain, removed)
    if len(timed) == len(sequences):
        print(
            f"        first removals {'agree' if removals[:1] == removed else 'DIFFER'}", flush=True
        )

    # The head counts as blocks by its time, as in the bound.
    of_step = len(timed) * (count - 2) * (count - 1 + head)
    seconds = sum(plain.seconds) * (plain.block_passes + head * plain.head_passes) / of_step
    taken = sum(ours.seconds)
    return {
        "ratio": f"{seconds / taken:.2f}x in time, plain at {seconds:.0f} s by its passes",
        "products": f"{taken / bound:.2f}x its matrix products alone, {bound:.0f} s",
        "evaluations": f"{ours.head_passes / evaluations:.0%} of the evaluations",
        "passes": f"{plain.block_passes / ours.block_passes:.2f}x in block passes, "
        f"{plain.head_passes / ours.head_passes:.2f}x in head passes",
    }


@torch.inference_mode()
def bare_seconds(
    model: Any, blocks: nn.ModuleList, ours: Side, batch: torch.Size
) -> tuple[float, float]:
    """Time the matrix products of all our passes alone; also return how many block passes a head
    pass costs.
    """
    config, length = model.config.get_text_config(), batch[1]
    weights = [part.weight for part in blocks[0].modules() if isinstance(part, nn.Linear)]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = torch.randn(batch[0], config.num_attention_heads, length, width, dtype=model.dtype)
    inputs = {
        size: torch.randn(batch.numel(), size, dtype=model.dtype)
        for size in {w.shape[1] for w in weights}
    }
    head, few = model.get_output_embeddings().weight, settings_for(CPU).head_positions
    rows = torch.randn(few, head.shape[1], dtype=model.dtype)

    def block() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    of_block = median_seconds(block) / batch[0]
    of_head = median_seconds(lambda: linear(rows, head)) * length / few
    return ours.block_passes * of_block + ours.head_passes * of_head, of_head / of_block


def median_seconds(run: Callable[[], object]) -> float:
    return statistics.median(timeit.repeat(run, number=1, repeat=12)[2:])


def search(
    model: Any, blocks: nn.ModuleList, sequences: torch.Tensor, remove: int, *, fast: bool = False
) -> tuple[Side, list[int], torch.Size]:
    """Run our search as `sleb search` does and count its passes; also return a batch's shape."""
    removals = []
    side = Side()
    with SkippableModel(model, blocks) as skippable:
        count_passes(skippable, side, sequences.shape[1])
        start = time.perf_counter()
        passes, reason = prepare_passes(
            skippable, sequences, ignore, min_batches=LOOKS if fast else 1
        )
        assert reason is None, reason
        # Greedily by the loss, with the first and the last block protected.
        score = Scoring(NegativeLogLikelihood(), passes, Journal(), None, ignore, fast=fast).score
        for choice in greedy(
            Problem(score, partial(Protection(1, 1).candidates, len(blocks)), remove)
        ):
            removals.append(choice.block)
            side.seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return side, removals, passes.batches[0].shape


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


def show(name: str, side: Side, removals: list[int]) -> None:
    seconds = " + ".join(f"{step:.0f}" for step in side.seconds)
    print(f"{name:7} removes {removals} in {sum(side.seconds):.1f} s ({seconds})")
    print(
        f"        {side.block_passes:,} block passes, {side.head_passes:,.0f} head passes",
        flush=True,
    )


if __name__ == "__main__":
    main()
