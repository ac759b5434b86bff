"""How often a search with weights in 8 or 4 bits removes the blocks that the search in bfloat16 removes.

    python tests/benchmarks/fewer_bits.py MODEL TEXT [--remove 6] [--samples 16] [--length 256] [--dequantize]

Prints for each width the blocks in order, how many of them the plain search removes too, and what the other choice
costs: the loss of both sets in bfloat16, in nats per token, on the same text.

On a CPU, bitsandbytes takes weights apart for every product, and is slow. With `--dequantize`, they are taken apart
once, after loading, so what rounding to 8 or 4 bits changes is measured at the speed of bfloat16.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from arguments import parser

from sleb_cli import api
from sleb_cli.engine.forward import placement
from sleb_cli.plan import Plan
from sleb_cli.requests import SearchRequest


def main() -> None:
    found = parser(__doc__, "model", "text", remove=6, samples=16, length=256, dequantize=False)
    options = found.parse_args()
    plain = search(options, remove=options.remove)
    print("| weights | removed | of them as in bfloat16 | same order | loss in bfloat16 | seconds |")
    print("|---|---|---|---|---|---|")
    show("bfloat16", plain, plain, plain.steps[-1].perplexity)
    for bits in ("8bit", "4bit"):
        found = search(options, remove=options.remove, load_in=bits)
        same = set(found.removals) == set(plain.removals)
        show(bits, found, plain, plain.steps[-1].perplexity if same else perplexity_of(options, found))


def search(options: argparse.Namespace, **settings: Any) -> Plan:
    """Search, with nothing printed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(placement, "load_dense", partial(_load, placement.load_dense, dequantize=options.dequantize)),
    ):
        request = SearchRequest(
            options.model,
            calibration=options.text,
            samples=options.samples,
            sequence_length=options.length,
            sample_tokens=0,
            dtype="bfloat16",
            fast=False,
            output=Path(folder) / "plan.json",
            **settings,
        )
        return api.search(request)


def _load(load_dense: Any, *given: Any, dequantize: bool, **options: Any) -> Any:
    model = load_dense(*given, **options)
    return model.dequantize(torch.bfloat16) if dequantize and options["load_in"] else model


def perplexity_of(options: argparse.Namespace, found: Plan) -> float:
    """Return the perplexity in bfloat16 without these blocks: a search that has no other choice."""
    others = tuple(block for block in range(found.model.blocks) if block not in found.removals)
    plan = search(options, remove=len(found.removals), protect=others, protect_first=0, protect_last=0)
    return plan.steps[-1].perplexity


def show(name: str, found: Plan, plain: Plan, perplexity: float) -> None:
    alike = len(set(found.removals) & set(plain.removals))
    order = sum(a == b for a, b in zip(found.removals, plain.removals, strict=True))
    print(
        f"| {name} | {', '.join(map(str, found.removals))} | {alike} of {len(plain.removals)} | {order} | "
        f"{math.log(perplexity):.4f} | {found.environment.seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
