"""The effect of the calibration text: search on A, test on B, for all pairs, as a Markdown table.

    python tests/benchmarks/calibration.py MODEL DATA WORK [--remove 6] [--samples 16] [--length 128] [--tests 32]
        [--only "NAME;NAME"] [--fast] [--chat]

DATA is a folder with text/enwiki_train.txt, text/enwiki_test.txt, text/c4_50.jsonl and tasks/arc_easy.jsonl. No text is
both searched and tested on: encyclopaedia has two files, C4 is cut into halves, and the model writes its own text (with
--chat, also its answers to questions of ARC-easy) with one seed for the search and another for the test. WORK holds all
results: a plan for each search, which resumes if interrupted, and results.json. A perplexity is bold if its loss,
paired over the windows, is within two standard errors of the best in its column.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import saved_work
import torch
from saved_work import markdown, paired, resumed, run_sleb, say

from sleb_cli.atomic import write_text
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.text.calibration import CalibrationSettings, calibrate, resolve_calibration
from sleb_cli.events import ignore
from sleb_cli.plan import read_plan
from sleb_cli.requests import CalibrationRequest, Chat
from sleb_plugins.metrics.nll import NegativeLogLikelihood

ANSWER_TOKENS = 64
BATCH = 8


class Bench(saved_work.Bench):
    """The model, the texts, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        setting = {"length": options.length, "tests": options.tests, "samples": options.samples}
        super().__init__(options, "results", setting, ("losses",))

    @cached_property
    def model(self) -> Any:
        return self.load(self.architecture)

    def texts(self) -> tuple[dict[str, tuple[str, ...]], dict[str, CalibrationSettings]]:
        """Return the options of each search, and the texts to test on."""
        text, options = self.options.data / "text", self.options
        halves = self._halves(text / "c4_50.jsonl")
        chat = self._chat(self.options.data / "tasks" / "arc_easy.jsonl") if options.chat else None
        wiki = text / "enwiki_train.txt"
        searches = {
            "encyclopaedia": ("--calibration", str(wiki)),
            "C4": ("--calibration", str(halves[0])),
            "self": ("--calibration", "self"),
            "encyclopaedia and self": ("--calibration", f"{wiki}:0.5,self:0.5"),
            "encyclopaedia, C4, self": ("--calibration", f"{wiki}:1/3,{halves[0]}:1/3,self:1/3"),
        }
        tests = {
            "encyclopaedia": self._test_text(text / "enwiki_test.txt", options.tests),
            "C4": self._test_text(halves[1], options.tests),
            "self": self._test_text("self", options.tests),
        }
        if chat:
            searches["chat, answers"] = ("--calibration", str(chat[0]), "--chat", "answers")
            tests["chat, answers"] = self._test_text(chat[1], options.samples, chat="answers")
        return searches, tests

    def _test_text(self, source: Path | str, samples: int, *, chat: Chat | None = None) -> CalibrationSettings:
        request = CalibrationRequest(
            calibration=str(source), samples=samples, sequence_length=self.options.length, seed=1
        )
        return resolve_calibration(request, self.architecture, chat=chat)

    def _halves(self, path: Path) -> tuple[Path, Path]:
        """Split the documents into two files that share none."""
        lines = path.read_text().splitlines(keepends=True)
        middle = len(lines) // 2
        return self._write("c4_search.jsonl", lines[:middle]), self._write("c4_test.jsonl", lines[middle:])

    def _chat(self, path: Path) -> tuple[Path, Path]:
        """Let the model answer one set of questions for the search and another for the test."""
        places = self.work.folder / "chat_search.jsonl", self.work.folder / "chat_test.jsonl"
        count = 3 * self.options.samples
        asked = [json.loads(line)["query"].removeprefix("Question: ") for line in path.read_text().splitlines()]
        for place, questions in zip(places, (asked[:count], asked[count : 2 * count]), strict=True):
            if not place.exists():
                answers = self._answer(questions, seed=places.index(place))
                lines = [
                    json.dumps({"messages": [*question(text), {"role": "assistant", "content": answer}]}) + "\n"
                    for text, answer in zip(questions, answers, strict=True)
                ]
                self._write(place.name, lines)
        return places

    @torch.inference_mode()
    def _answer(self, questions: list[str], seed: int) -> list[str]:
        """Sample an answer to each question, `BATCH` at a time."""
        torch.manual_seed(seed)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        answers: list[str] = []
        for start in range(0, len(questions), BATCH):
            prompts = [question(text) for text in questions[start : start + BATCH]]
            inputs = self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            )
            ids = self.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=ANSWER_TOKENS,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            answers += self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def _write(self, name: str, lines: list[str]) -> Path:
        write_text(self.work.folder / name, "".join(lines))
        return self.work.folder / name

    def search(self, name: str, text: tuple[str, ...]) -> tuple[int, ...]:
        """Return the blocks that a search on this text removes; search only if there is no plan yet."""
        options, plan = self.options, self.work.folder / f"{name.replace(' ', '-')}.json"
        if not plan.exists():
            setting = ["--remove", options.remove, "--samples", options.samples, "--sequence-length", options.length]
            fast = ["--fast"] if options.fast else []
            run_sleb(
                "search", options.model, *text, *setting, *fast, "-o", plan, *resumed(plan), "--sample-tokens", 0, "-q"
            )
        return read_plan(plan).removals

    @torch.inference_mode()
    def test(self, removed: tuple[int, ...], name: str, settings: CalibrationSettings) -> list[float]:
        """Return the loss of each test window without these blocks; measure only what is missing."""
        known = self.work.data["losses"].setdefault(",".join(map(str, sorted(removed))) or "dense", {})
        if name not in known:
            text = calibrate(settings, self.tokenizer, lambda: self.model, ignore)
            losses: list[float] = []
            with SkippableModel(self.model, self.architecture.blocks_of(self.model)) as skippable:
                for start in range(0, len(text.sequences), BATCH):
                    part = text.part(slice(start, start + BATCH))
                    logits = skippable.logits(part.sequences, removed)
                    scores = score_logits(NegativeLogLikelihood(), logits, part.sequences, loss_mask=part.loss_mask)
                    losses += scores.tolist()
            known[name] = losses
            self.work.save()
        found: list[float] = known[name]
        return found


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def table(blocks: dict[str, tuple[int, ...]], losses: dict[str, dict[str, list[float]]]) -> str:
    """Return the Markdown table: a pruned model per row, a test text per column."""
    tests = list(next(iter(losses.values())))
    best = {
        test: min((found[test] for name, found in losses.items() if name != "dense"), key=statistics.fmean)
        for test in tests
    }

    def cell(name: str, test: str) -> str:
        found = losses[name][test]
        perplexity = f"{math.exp(statistics.fmean(found)):.2f}"
        behind, error = paired(found, best[test])
        return f"**{perplexity}**" if name != "dense" and behind <= 2 * error else perplexity

    rows = [[name, *(cell(name, test) for test in tests), ", ".join(map(str, blocks.get(name, ())))] for name in losses]
    return markdown(["searched on", *(f"tested on {test}" for test in tests), "blocks"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--remove", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tests", type=int, default=32)
    parser.add_argument("--only", help="searches to run now, separated by semicolons")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--chat", action="store_true", help="also search and test on the model's own answers")
    parser.set_defaults(dtype="auto", device="cpu")
    options = parser.parse_args()

    quiet_libraries()
    bench = Bench(options)
    searches, tests = bench.texts()
    wanted = options.only.split(";") if options.only else list(searches)
    blocks = {name: bench.search(name, searches[name]) for name in wanted}
    losses = {
        name: {test: bench.test(removed, test, settings) for test, settings in tests.items()}
        for name, removed in {"dense": (), **blocks}.items()
    }
    say(table(blocks, losses))
    print(
        f"{options.samples} x {options.length} tokens searched on, {options.tests} windows tested on", file=sys.stderr
    )


if __name__ == "__main__":
    main()
