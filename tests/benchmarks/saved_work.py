"""What the benchmarks share: their options, the models, searches, and results that survive a stop."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sleb_cli.__main__ import main as sleb
from sleb_cli.atomic import to_json, write_text
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.search.choices import Choice, Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer, quiet_libraries
from sleb_cli.engine.text.calibration import Calibration, calibrate, draw
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.engine.text.windows import adds_bos, cut_windows
from sleb_cli.events import ignore
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins.metrics.nll import NegativeLogLikelihood

TRAIN = "text/enwiki_train.txt"
TEXTS = {"enwiki": "text/enwiki_test.txt", "C4": "text/c4_50.jsonl"}
LONG = {"length": 256, "windows": 24, "window_length": 512, "dtype": "bfloat16", "device": "cpu", "show": False}
"""Options of the long benchmarks."""


def parser(doc: str | None, *places: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of these positional arguments, and of an option for each default, of its type.

    False makes a flag, a type an option without a default, and a list one whose values are separated by commas.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for place in places:
        found.add_argument(place)
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            found.add_argument(flag, action="store_true")
        elif isinstance(default, type):
            found.add_argument(flag, type=default)
        elif isinstance(default, list):
            kind = type(default[0]) if default else str
            found.add_argument(flag, type=separated(kind), default=default, help=",".join(map(str, default)))
        else:
            found.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    return found


def separated(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


class Bench:
    """The model, the data and the options of a benchmark, and its results so far, in --work.

    Results of other settings, which are the values of the options that `setting` names, are never mixed with them.
    """

    name: str
    setting: tuple[str, ...]

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.source, self.work = options, Path(options.data), Path(options.work)
        self.architecture = architecture_of(options.model)
        model = self.architecture.record.model_dump(mode="json", include={"model_type", "fingerprint", "blocks"})
        setting = {"model": model} | {name: getattr(options, name) for name in self.setting}
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.work / f"{self.name}.json"
        self.results = {"setting": setting, "models": {}}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        if self.results["setting"] != setting:
            raise SystemExit(f"{self.file} is of {self.results['setting']}, not {setting}: use another --work.")

    def of(self, removed: Sequence[int]) -> dict[str, Any]:
        """Return the results of the model without these blocks, removed in any order."""
        found: dict[str, Any] = self.results["models"].setdefault(",".join(map(str, sorted(removed))), {})
        return found

    def save(self, removed: Sequence[int], name: str, result: Any) -> None:
        self.of(removed)[name] = result
        write_text(self.file, to_json(self.results))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.architecture.source)

    @property
    def placed(self) -> tuple[torch.dtype, torch.device]:
        """The data type and the device of the models."""
        device = torch.device(self.options.device)
        return place_model(self.architecture, device, self.options.dtype, ignore, stream=False).dtype, device

    def load(self, architecture: Architecture) -> Any:
        return load_dense(architecture, *self.placed, ignore)

    def searched_plan(self, file: Path, *given: Any) -> Plan:
        """Search through the command line, unless that is done; resume an interrupted search."""
        options, journal = self.options, file.with_name(f"{file.name}.journal")
        if not file.exists():
            sizes = ["--samples", options.samples, "--sequence-length", options.length]
            resumed = ["--resume"] if journal.exists() else []
            run_sleb("search", options.model, *sizes, *given, "-o", file, "-q", *resumed)
        return read_plan(file)

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Windows of each text, drawn at random positions, each beginning with BOS if the tokenizer's texts do."""
        found, bos = {}, adds_bos(self.tokenizer)
        for name, place in TEXTS.items():
            text = evaluation_text(str(self.source / place)).content
            windows = cut_windows(self.tokenizer, text, self.options.window_length, bos=bos)
            found[name] = windows[draw(len(windows), self.options.windows, seed=0)].to(self.options.device)
        return found

    def run(self) -> None:
        """Let the subclass `measure` what is missing, unless only to --show, and say the parts of its `report`."""
        quiet_libraries()
        if not self.options.show:
            try:
                self.measure()
            except KeyboardInterrupt:
                say("stopped: the same command resumes")
        say("\n\n".join(self.report()))

    def how_measured(self, *others: str) -> str:
        """Return the command, with the setting and other options but no paths of this machine, and the versions."""
        options, words = self.options, []
        for name in (*others, *self.setting):
            value = getattr(options, name)
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            if text:
                words.append(f"--{name.replace('_', '-')}" + ("" if text is True else f" {text}"))
        return (
            f"`python tests/benchmarks/{self.name}.py {' '.join([Path(options.model).name, 'DATA', *words])}`\n\n"
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"{time.strftime('%Y-%m-%d')}, {processor_name(torch.device(options.device))}."
        )


def greedy_search(passes: Passes, remove: int, *, journal: Journal | None = None, **options: Any) -> Iterator[Choice]:
    """Search greedily by the loss, with the first and the last block protected."""
    journal = Journal() if journal is None else journal  # an empty one is false
    score = Scoring(NegativeLogLikelihood(), passes, journal, None, ignore, **options).score
    candidates = partial(Protection(1, 1).candidates, len(passes.skippable.switches))
    return greedy(Problem(score, candidates, remove))


def calibrated(options: argparse.Namespace, text: str, dtype: str) -> tuple[Any, Any, Calibration]:
    """Load the model of a benchmark and its blocks, and cut `text` as its options say."""
    quiet_libraries()
    architecture, device = architecture_of(options.model), torch.device("cpu")
    computed = place_model(architecture, device, dtype, ignore, stream=False).dtype
    model = load_dense(architecture, computed, device, ignore)
    settings = resolve_calibration(architecture, text, options.samples, options.length, options.seed)
    tokenizer = load_tokenizer(architecture.source)
    calibration = calibrate(settings, tokenizer, lambda: model, ignore)
    return model, architecture.blocks_of(model), calibration


def architecture_of(model: object) -> Architecture:
    return read_architecture(locate_model(str(model), ignore), load_plugins(), ignore)


def run_sleb(*command: Any) -> None:
    """Run a `sleb` command in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = sleb([str(part) for part in command])
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise SystemExit(f"sleb {shlex.join(map(str, command))} ended with {code}")


def say(text: str) -> None:
    print(text, flush=True)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over the same windows, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
