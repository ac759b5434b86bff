"""What it costs to count how a text uses the experts of a model: a walk that counts, beside one
that does not.

    python tests/benchmarks/experts.py MODEL TEXT [--samples 4] [--length 256] [--runs 3]

The experts run twice in a walk that counts. Both run in turn on the same batches; the best time of
each counts.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import architecture_of, calibrated, parser

from sleb_cli.engine.cut.experts.routing import watch_routing
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.experts import find_experts
from sleb_cli.engine.search.experts import sum_expert_use
from sleb_cli.events import ignore
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def main() -> None:
    options = parser(__doc__, "model", "text", samples=4, length=256, runs=3).parse_args()
    model, blocks, calibration = calibrated(
        options.model, options.text, options.samples, options.length
    )
    experts = find_experts(architecture_of(options.model))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with SkippableModel(model, blocks) as skippable, torch.inference_mode():
        passes, _ = prepare_passes(skippable, calibration.sequences, ignore)
        jobs = [(batch, ()) for batch in passes.numbers]
        for _ in range(options.runs):
            for counts in seconds:
                counting = watch_routing(
                    experts, [*blocks], lambda _, routing: sum_expert_use(routing, experts.count)
                )
                with counting if counts else nullcontext():
                    started = time.perf_counter()
                    for _ in passes.score(NegativeLogLikelihood(), (), jobs):
                        pass
                    seconds[counts].append(time.perf_counter() - started)
    plain, counted = min(seconds[False]), min(seconds[True])
    print(
        f"{calibration.sequences.numel():,} tokens in {dtype_name(model.dtype)}, {experts.count} "
        f"experts in each block"
    )
    print(f"a walk: {plain:.1f} s; one that counts: {counted:.1f} s, {counted / plain:.2f}x")


if __name__ == "__main__":
    main()
