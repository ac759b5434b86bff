"""What the long benchmarks share: results that survive a stop, and the data."""

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
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import arguments
import torch
import transformers
from torch import Tensor

from sleb_cli.__main__ import main as sleb
from sleb_cli.atomic import to_json, write_text
from sleb_cli.engine.device import choose_dtype
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.search.choices import Choice, Protection
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer, quiet_libraries
from sleb_cli.engine.text.calibration import Calibration, calibrate, draw, resolve_calibration
from sleb_cli.engine.text.sources import evaluation_text
from sleb_cli.events import ignore
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import CalibrationRequest
from sleb_plugins.metrics.nll import NegativeLogLikelihood

TRAIN = "text/enwiki_train.txt"
TEXTS = {"enwiki": "text/enwiki_test.txt", "C4": "text/c4_50.jsonl"}
DENSE = "dense"


class Stopped(Exception):
    """The user interrupted, or a time limit did; all results are saved."""


class SavedWork:
    """The results so far, by kind, in `folder`/`name`.json; results of another setting are never mixed with them."""

    def __init__(self, folder: Path, name: str, setting: dict[str, Any], kinds: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"{name}.json"
        self.data: dict[str, Any] = {"setting": setting} | {kind: {} for kind in kinds}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data["setting"] != setting:
                raise SystemExit(
                    f"{self.path} was measured with {self.data['setting']}, not {setting}: use another --work."
                )

    def save(self) -> None:
        write_text(self.path, to_json(self.data))


class Bench:
    """The model, the data and the options of a benchmark, and its results so far."""

    def __init__(self, options: argparse.Namespace, name: str, setting: dict[str, Any], kinds: tuple[str, ...]) -> None:
        self.options = options
        self.architecture = architecture_of(options.model)
        model = self.architecture.record.model_dump(mode="json", include={"model_type", "fingerprint", "blocks"})
        self.work = SavedWork(options.work, name, {"model": model} | setting, kinds)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.architecture.source)

    @property
    def placed(self) -> tuple[torch.dtype, torch.device]:
        """The data type and the device of the models."""
        device = torch.device(self.options.device)
        return choose_dtype(self.options.dtype, self.architecture.config.dtype, device), device

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

    def drawn_windows(self, cut: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return windows of each text, drawn at random positions."""
        cuts = {name: cut(evaluation_text(str(self.options.data / place)).content) for name, place in TEXTS.items()}
        return {name: windows[draw(len(windows), self.options.windows, seed=0)] for name, windows in cuts.items()}


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
    model = load_dense(architecture, choose_dtype(dtype, architecture.config.dtype, device), device, ignore)
    request = CalibrationRequest(
        calibration=text, samples=options.samples, sequence_length=options.length, seed=options.seed
    )
    tokenizer = load_tokenizer(architecture.source)
    calibration = calibrate(resolve_calibration(request, architecture), tokenizer, lambda: model, ignore)
    return model, architecture.blocks_of(model), calibration


def architecture_of(model: object, *, config_only: bool = False) -> Architecture:
    return read_architecture(locate_model(str(model), ignore, config_only=config_only), load_plugins(), ignore)


def run_sleb(*command: Any) -> None:
    """Run a `sleb` command in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = sleb([str(part) for part in command])
    if code in (130, 143):
        raise Stopped
    if code:
        raise SystemExit(f"sleb {shlex.join(map(str, command))} ended with {code}")


def run_saved(bench: Bench, measure: Callable[[Any], None], report: Callable[[Any], str]) -> None:
    """Measure what is missing, unless only to --show, and report."""
    quiet_libraries()
    if not bench.options.show:
        try:
            measure(bench)
        except (Stopped, KeyboardInterrupt):
            say("stopped: the same command resumes")
    say(report(bench))


def say(text: str) -> None:
    print(text, flush=True)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over the same windows, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def how_measured(options: argparse.Namespace, script: str, names: Sequence[str]) -> list[str]:
    """Return the command, with the named options but no paths of this machine, and the versions."""
    words = []
    for name in names:
        value = getattr(options, name)
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        if text:
            words.append(f"--{name.replace('_', '-')}" + ("" if text is True else f" {text}"))
    return [
        f"`python tests/benchmarks/{script} {' '.join([Path(options.model).name, 'DATA', *words])}`",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, {processor_name(torch.device(options.device))}.",
    ]


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that the long benchmarks share."""
    shared = {"length": 256, "windows": 24, "window_length": 512, "dtype": "bfloat16", "device": "cpu", "show": False}
    found = arguments.parser(doc, "model", **shared | defaults)
    found.add_argument("data", type=Path)
    return found


def require_known(parser: argparse.ArgumentParser, what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            parser.error(f"no {what} {name}: choose from {', '.join(known)}")
