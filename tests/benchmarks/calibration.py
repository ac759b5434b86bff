"""The effect of the calibration text: search on A, test on B, for all pairs, as a Markdown table.

    python tests/benchmarks/calibration.py MODEL DATA WORK [--remove 6] [--samples 16] [--length 128] [--tests 32]
        [--only NAME,NAME] [--fast]

DATA is a folder with text/enwiki_train.txt, text/enwiki_test.txt and text/c4_50.jsonl. No text is both searched and
tested on: encyclopaedia has two files, C4 is cut into halves, and the model writes its own text with one seed for the
search and another for the test. With --only, only these searches run now. WORK holds all
results: a plan for each search, which resumes if interrupted, and calibration.json. A perplexity is bold if its loss,
paired over the windows, is within two standard errors of the best in its column.
"""

from __future__ import annotations

import math
import statistics
from functools import cached_property
from typing import Any

import torch
from saved_work import Bench, markdown, paired, parser, say

from sleb_cli.atomic import write_text
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.settings import CalibrationSettings, resolve_calibration
from sleb_cli.events import ignore
from sleb_plugins.metrics.nll import NegativeLogLikelihood

BATCH = 8


class CalibrationBench(Bench):
    name = "calibration"
    setting = ("samples", "length", "tests")

    @cached_property
    def model(self) -> Any:
        return self.load(self.architecture)

    def texts(self) -> tuple[dict[str, str], dict[str, CalibrationSettings]]:
        """Return the text of each search, and the texts to test on."""
        text = self.source / "text"
        lines = (text / "c4_50.jsonl").read_text().splitlines(keepends=True)
        halves = [self.work / f"c4_{part}.jsonl" for part in ("search", "test")]
        for half, part in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
            write_text(half, "".join(part))
        wiki = text / "enwiki_train.txt"
        searches = {
            "encyclopaedia": str(wiki),
            "C4": str(halves[0]),
            "self": "self",
            "encyclopaedia and self": f"{wiki}:0.5,self:0.5",
            "all three": f"{wiki}:1/3,{halves[0]}:1/3,self:1/3",
        }
        tests = {"encyclopaedia": text / "enwiki_test.txt", "C4": halves[1], "self": "self"}
        size = (self.options.tests, self.options.length, 1)
        return searches, {n: resolve_calibration(self.architecture, str(text), *size) for n, text in tests.items()}

    def search(self, name: str, text: str) -> tuple[int, ...]:
        """Return the blocks that a search on this text removes; search only if there is no plan yet."""
        options, plan = self.options, self.work / f"{name.replace(' ', '-')}.json"
        given = ["--calibration", text, "--remove", options.remove, *(["--fast"] if options.fast else [])]
        return self.searched_plan(plan, *given, "--sample-tokens", 0).removals

    @torch.inference_mode()
    def test(self, removed: tuple[int, ...], name: str, settings: CalibrationSettings) -> list[float]:
        """Return the loss of each test window without these blocks; measure only what is missing."""
        if name not in self.of(removed):
            text = calibrate(settings, self.tokenizer, lambda: self.model, ignore)
            losses: list[float] = []
            with SkippableModel(self.model, self.architecture.blocks_of(self.model)) as skippable:
                for start in range(0, len(text.sequences), BATCH):
                    part = text.part(slice(start, start + BATCH))
                    logits = skippable.logits(part.sequences, removed)
                    scores = score_logits(NegativeLogLikelihood(), logits, part.sequences, loss_mask=part.loss_mask)
                    losses += scores.tolist()
            self.save(removed, name, losses)
        found: list[float] = self.of(removed)[name]
        return found


def table(blocks: dict[str, tuple[int, ...]], losses: dict[str, dict[str, list[float]]]) -> str:
    """Return the Markdown table: a pruned model per row, a test text per column."""
    tests = list(losses["dense"])
    best = {test: min((losses[name][test] for name in blocks), key=statistics.fmean) for test in tests}

    def cell(name: str, test: str) -> str:
        found = losses[name][test]
        perplexity = f"{math.exp(statistics.fmean(found)):.2f}"
        behind, error = paired(found, best[test])
        return f"**{perplexity}**" if name in blocks and behind <= 2 * error else perplexity

    rows = [[name, *(cell(name, test) for test in tests), ", ".join(map(str, blocks.get(name, ())))] for name in losses]
    return markdown(["searched on", *(f"tested on {test}" for test in tests), "blocks"], rows)


def main() -> None:
    sizes = {"remove": 6, "samples": 16, "length": 128, "tests": 32}
    found = parser(__doc__, "model", "data", "work", **sizes, only=[], fast=False)
    found.set_defaults(dtype="auto", device="cpu")
    options = found.parse_args()

    quiet_libraries()
    bench = CalibrationBench(options)
    searches, tests = bench.texts()
    blocks = {name: bench.search(name, searches[name]) for name in options.only or searches}
    losses = {
        name: {test: bench.test(removed, test, settings) for test, settings in tests.items()}
        for name, removed in {"dense": (), **blocks}.items()
    }
    say(table(blocks, losses))
    say(f"{options.samples} x {options.length} tokens searched on, {options.tests} windows tested on")


if __name__ == "__main__":
    main()
