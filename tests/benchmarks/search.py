"""How much faster the search of `sleb` is than the plain algorithm, in one run on the same data.

    python tests/benchmarks/search.py FOLDER TEXT [--samples 4] [--length 128] [--remove 2] [--dtype bfloat16]

Plain means: one sequence and one candidate at a time, through the whole model, with hooks only. Both sides
must remove the same blocks. Times are of the search alone, after the model is loaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reference import plain_search
from sleb_cli.engine.architecture import read_architecture
from sleb_cli.engine.calibration import draw
from sleb_cli.engine.gates import GatedModel
from sleb_cli.engine.greedy import greedy_search
from sleb_cli.engine.loading import choose_dtype, load_dense, load_tokenizer, quiet_libraries
from sleb_cli.engine.scoring import Scoring
from sleb_cli.engine.search import TOKENS_PER_BATCH
from sleb_cli.engine.source import locate_model
from sleb_cli.engine.windows import adds_bos, cut_windows
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins.metrics.nll import NegativeLogLikelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--remove", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    quiet_libraries()
    device = torch.device("cpu")
    architecture = read_architecture(locate_model(options.folder, _ignore), load_plugins(), print)
    tokenizer = load_tokenizer(architecture.source)
    model = load_dense(architecture, choose_dtype(options.dtype, architecture, device), device, _ignore)
    blocks = architecture.blocks_of(model)
    windows = cut_windows(tokenizer, options.text.read_text(), options.length, bos=adds_bos(tokenizer))
    sequences = draw(windows, options.samples, 0)

    start = time.perf_counter()
    plain, _ = plain_search(model, blocks, sequences, options.remove)
    plain_seconds = time.perf_counter() - start

    start = time.perf_counter()
    batches = torch.split(sequences, max(1, TOKENS_PER_BATCH // options.length))
    with GatedModel(model, blocks) as gated:
        score, engine, _ = Scoring(gated, batches, tokenizer, _ignore).scorer(NegativeLogLikelihood())
        choices = greedy_search(score, len(blocks), options.remove, protect_first=1, protect_last=1)
        ours = [choice.block for choice in choices]
    our_seconds = time.perf_counter() - start

    print(f"{len(sequences)} x {options.length} tokens, {options.remove} of {len(blocks)} blocks, {options.dtype}")
    print(f"plain   {plain_seconds:7.1f} s  removes {plain}")
    print(f"{engine:7} {our_seconds:7.1f} s  removes {ours}")
    print(f"ratio   {plain_seconds / our_seconds:7.2f}x, removals {'agree' if plain == ours else 'DIFFER'}")


def _ignore(event: object) -> None:
    """Say nothing of the progress."""


if __name__ == "__main__":
    main()
