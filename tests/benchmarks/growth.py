"""How search time grows with blocks, sequences and removals, with a projection to a large model.

    python tests/benchmarks/growth.py [--hidden 256] [--length 256]

The models are random Llamas. The exponent of a column is the slope between its first and last row on logarithmic
scales. The projection counts block passes as the search does, on a model of 80 blocks with removals at `--depth`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reference import plain_search
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--depth", type=float, default=0.7, help="relative depth of the large model's removals")
    options = parser.parse_args()
    quiet_libraries()

    def run(blocks: int, sequences: int, remove: int) -> tuple[float, float]:
        return seconds(blocks, sequences, remove, hidden=options.hidden, length=options.length)

    table("blocks", [8, 16, 32, 64], lambda blocks: run(blocks, 4, 1))
    table("sequences", [4, 8, 16, 32], lambda sequences: run(16, sequences, 1))
    table("removals", [1, 2, 4, 8], lambda remove: run(16, 4, remove))
    project(options.depth)


def table(what: str, values: list[int], run: Callable[[int], tuple[float, float]]) -> None:
    print(f"\n{what:>9} | ours, s | plain, s | ratio\n----------|---------|----------|------")
    rows = []
    for value in values:
        ours, plain = run(value)
        rows.append((value, ours, plain))
        print(f"{value:9d} | {ours:7.2f} | {plain:8.2f} | {plain / ours:5.2f}", flush=True)
    (first, *low), (last, *high) = rows[0], rows[-1]
    ours, plain = (math.log(b / a) / math.log(last / first) for a, b in zip(low, high, strict=True))
    print(f" exponent | {ours:7.2f} | {plain:8.2f} |", flush=True)


def seconds(blocks: int, sequences: int, remove: int, *, hidden: int, length: int) -> tuple[float, float]:
    """Return the seconds of our search and of the plain one on a random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, max_position_embeddings=length,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 4096, (sequences, length))
    start = time.perf_counter()
    with SkippableModel(model, model.model.layers) as skippable:
        passes, _ = prepare_passes(skippable, ids, lambda event: None)
        score = Scoring(NegativeLogLikelihood(), passes, Journal(), None, lambda event: None).score
        ours = [c.block for c in greedy(Problem(score, partial(Protection(1, 1).candidates, blocks), remove))]
    middle = time.perf_counter()
    plain, _ = plain_search(model, model.model.layers, ids, remove)
    end = time.perf_counter()
    if ours != plain:
        print(f"          (removals {ours} and {plain}: in bfloat16, random blocks are as good as equal)")
    return middle - start, end - middle


def project(depth: float, blocks: int = 80, remove: int = 16) -> None:
    """Estimate a search of Llama-2-70B: hidden size 8192, MLP 28672, 8 key-value heads, 128 x 2048 tokens."""
    hidden, wide, kv, vocabulary, length, sequences = 8192, 28672, 1024, 32000, 2048, 128
    weights = 2 * hidden * (hidden + kv) + 3 * hidden * wide
    tokens = sequences * length
    block = (2 * weights + 2 * length * hidden) * tokens  # causal attention reads half of the positions on average
    head = 2 * hidden * vocabulary * tokens
    plain = fork = reuse = heads = 0
    for step in range(remove):
        left = blocks - step
        candidates = left - 2
        below = min(candidates, round(depth * left)) if step else 0  # known up to here from the step before
        plain += candidates * (left - 1)
        walk = sum(left - 1 - block for block in range(1, candidates + 1)) + candidates
        saved = sum(below - block for block in range(1, below)) + below
        fork += walk
        reuse += walk - saved
        heads += candidates
    print(f"\nLlama-2-70B, {remove} of {blocks} blocks at {depth:.0%} of its depth, {sequences} x {length} tokens")
    for name, passes in (("plain", plain), ("fork", fork), ("fork with reuse", reuse)):
        flops = passes * block + heads * head
        hours = flops / 4e14 / 3600
        print(f"{name:16} {passes:7,} block passes, {heads:,} heads: {flops:.2e} FLOP, {hours:.0f} h at 400 TFLOP/s")
    print(f"one block, all tokens: {block:.2e} FLOP; its weights: {2 * weights / 1e9:.2f} GB in bfloat16")
    print(
        f"one branch of states: {2 * tokens * hidden / 1e9:.1f} GB for all tokens, {16384 * hidden / 1e9:.2f} for 8192"
    )


if __name__ == "__main__":
    main()
