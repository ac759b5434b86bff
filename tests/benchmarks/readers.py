"""How much faster `sleb` searches a model that only reads than plain loops, in one run.

    python tests/benchmarks/readers.py MODEL TEXT [--samples 256] [--length 128] [--remove 3]

The plain loops run every batch through the model without each candidate, in our batches of texts of
like length, and compare the vectors with the dense model's.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import architecture_of, parser

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.placement import open_model, place_model
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.padded import split
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.surgery.loading import Placement, load_tokenizer
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import ignore
from sleb_plugins.metrics.output import OutputDistance


def main() -> None:
    sizes = {"samples": 256, "length": 128, "remove": 3}
    options = parser(__doc__, "model", "text", **sizes).parse_args()
    quiet_libraries()
    architecture = architecture_of(options.model)
    settings = resolve_calibration(
        architecture,
        options.text,
        options.samples,
        options.length,
    )
    tokenizer = load_tokenizer(architecture.source)
    (calibration,) = calibrate([settings], tokenizer, lambda: None, ignore)
    dtype = place_model(
        architecture,
        CPU,
        "auto",
        ignore,
        stream=False,
    ).dtype
    with open_model(architecture, Placement(CPU, dtype), ignore) as model:
        start = time.perf_counter()
        ours, size = search(model, calibration.sequences, options.remove)
        middle = time.perf_counter()
        plain = plain_search(
            model,
            split(calibration.sequences, size),
            options.remove,
        )
        end = time.perf_counter()
    print(f"ours  removes {ours} in {middle - start:.1f} s, {size} texts in a batch, {dtype}")
    print(f"plain removes {plain} in {end - middle:.1f} s")
    print(f"{(middle - start) / (end - middle):.2f} of the time of plain loops")


def search(model: SkippableModel, texts: Any, remove: int) -> tuple[list[int], int]:
    """Search as `sleb search` does; also return how many texts a batch has."""
    passes, reason = prepare_passes(model, texts, ignore)
    assert reason is None, reason
    score = Scoring(OutputDistance(), passes, Journal(), None, ignore).score
    candidates = partial(Protection(1, 1).candidates, len(model.switches))
    choices = list(greedy(Problem(score, candidates, remove)))
    return list(choices[-1].removals), passes.budget.sequences


@torch.inference_mode()
def plain_search(model: SkippableModel, batches: Any, remove: int) -> list[int]:
    """Remove the block without which the vectors move least, again and again."""
    ending = model.ending
    dense = [ending.of_model(model, batch, ()) for batch in batches]
    removed: list[int] = []
    for _ in range(remove):
        distances = {}
        for block in set(range(1, len(model.switches) - 1)) - set(removed):
            total = 0.0
            for batch, expected in zip(batches, dense, strict=True):
                outputs = ending.of_model(model, batch, {*removed, block})
                total += float(ending.distance(outputs, expected).sum())
            distances[block] = total
        removed.append(min(distances, key=distances.__getitem__))
    return removed


if __name__ == "__main__":
    main()
