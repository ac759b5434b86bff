"""How search time grows with blocks, sequences and removals.

    python tests/benchmarks/growth.py [--hidden 256] [--length 256]

The models are random Llamas. The exponent of a column is the slope between its first and last row on logarithmic
scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from saved_work import parser
from search import search, search_plainly
from transformers import AutoModelForCausalLM, LlamaConfig

from sleb_cli.engine.surgery.loading import quiet_libraries


def main() -> None:
    options = parser(__doc__, hidden=256, length=256).parse_args()
    quiet_libraries()
    run = partial(seconds, hidden=options.hidden, length=options.length)
    table("blocks", [8, 16, 32, 64], lambda blocks: run(blocks, 4, 1))
    table("sequences", [4, 8, 16, 32], lambda sequences: run(16, sequences, 1))
    table("removals", [1, 2, 4, 8], lambda remove: run(16, 4, remove))


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
    (ours, removals), (plain, others) = (
        run(model, model.model.layers, ids, remove) for run in (search, search_plainly)
    )
    if removals != others:
        print(f"          (removals {removals} and {others}: in bfloat16, random blocks are as good as equal)")
    return sum(ours.seconds), sum(plain.seconds)


if __name__ == "__main__":
    main()
