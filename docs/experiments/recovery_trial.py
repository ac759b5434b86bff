# ruff: noqa: TID253
"""Recover a model in one way, and keep what came back as a row of recovery_trial.csv.

python docs/experiments/recovery_trial.py NAME MODEL BLOCKS WAY --text FOLDER --processor NAME

NAME is the model's in the table, BLOCKS are such as 17,14,13, and FOLDER holds enwiki_train.txt,
enwiki_test.txt and c4_50.jsonl. WAY is ridge, heal or both. A row in the table is not made again.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.door.named_model import resolve_subject
from sleb_cli.engine.door.recovery import resolve_recovery
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.checkpoint import Output
from sleb_cli.engine.recovery.recover import _draw_texts, _find_state
from sleb_cli.engine.recovery.stage import Job, RecoverySettings
from sleb_cli.engine.recovery.variant import DenseComparison, Losses, Variant, summed_losses
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import ApplyRequest

TABLE = Path(__file__).with_name("recovery_trial.csv")
WINDOWS = 24
LENGTH = 512


def main() -> None:
    """Make one row."""
    asked = parse()
    way = {"ridge": "ridge at each gap", "heal": "healed", "both": "ridge at each gap, healed"}[
        asked.way
    ]
    if asked.tokens:
        way += f" on {asked.tokens:,} tokens"
    if asked.samples:
        way += f", of {asked.samples} sequences"
    key = {"model": asked.name, "blocks": asked.blocks, "row": way, "seed": str(asked.seed)}
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    if any(key.items() <= row.items() and row["processor"] == asked.processor for row in rows):
        print("made already")
        return
    settings = resolve(asked)
    surgery = settings.surgery
    with open_model(surgery.architecture, settings.placement, ignore) as dense:
        values, minutes = run(settings, dense)
        key["minutes"] = f"{minutes:.1f}"
        key["processor"] = asked.processor
        for name, file in (("enwiki", "enwiki_test.txt"), ("c4", "c4_50.jsonl")):
            back, left = measure(settings, dense, values, str(asked.text / file))
            key[name] = back
            key[f"{name} KL left"] = left
    print(key)
    with TABLE.open("a") as file:
        csv.DictWriter(file, list(rows[0]), lineterminator="\n").writerow(key)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    for name in ("name", "model", "blocks"):
        parser.add_argument(name)
    parser.add_argument("way", choices=["ridge", "heal", "both"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--processor", default="EPYC")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def resolve(asked: argparse.Namespace) -> RecoverySettings:
    """Resolve the recovery that `sleb apply` would do."""
    source = locate_model(asked.model, print)
    own = "self-chat" if load_tokenizer(source).chat_template else "self"
    request = ApplyRequest(
        asked.model,
        recover=asked.way != "heal",
        heal={"ridge": False, "heal": True}.get(asked.way),
        heal_minutes=asked.minutes,
        heal_tokens=asked.tokens,
        samples=asked.samples,
        calibration=f"{asked.text / 'enwiki_train.txt'}:0.75,{own}:0.25",
        seed=asked.seed,
    )
    blocks = tuple(map(int, asked.blocks.split(",")))
    named = NamedSubject(request, asked.model, blocks)
    subject = resolve_subject(named, source, load_plugins(), print)
    output = Output(Path("trial"), False)
    return resolve_recovery(subject, request, output, ignore)


def run(settings: RecoverySettings, dense: SkippableModel) -> tuple[dict[str, Tensor], float]:
    """Return the new values, and the minutes of the stages; writing text is not counted."""
    train, validation, _, _ = _draw_texts(settings, dense, ignore)
    state = _find_state(settings, train, validation)
    state.save = lambda *arguments: None  # type: ignore[method-assign]
    job = Job(settings, dense, train, validation, state, show)
    values: dict[str, Tensor] = {}
    began = time.monotonic()
    for stage in settings.stages:
        values, _ = stage.run(job, values)
        print(f"{stage.title}: {time.monotonic() - began:.0f} s", flush=True)
    return values, (time.monotonic() - began) / 60


def measure(
    settings: RecoverySettings, dense: SkippableModel, values: Mapping[str, Tensor], text: str
) -> tuple[str, str]:
    """Return the share of the lost nats that is back, and that of the divergence that is left."""
    surgery = settings.surgery
    held_out = resolve_calibration(surgery.architecture, text, WINDOWS, LENGTH, 0)
    tokenizer = load_tokenizer(surgery.architecture.source)
    (drawn,) = calibrate([held_out], tokenizer, lambda: None, ignore)
    compared = DenseComparison(Variant(dense), drawn)
    with surgery.simulate(dense.model):
        of_dense = by_window(compared, Variant(dense))
        of_pruned = by_window(compared, Variant(dense, surgery.removed))
        of_ours = by_window(compared, Variant(dense, surgery.removed, values))
    losses = []
    for windows in (of_dense, of_pruned, of_ours):
        losses.append([window.loss for window in windows])
    left = sum(each.divergence for each in of_ours) / sum(each.divergence for each in of_pruned)
    return share(*losses), f"{100 * left:.1f}"


@torch.inference_mode()
def by_window(comparison: DenseComparison, variant: Variant) -> list[Losses]:
    """Return the losses of each window."""
    final = comparison._final_states(variant)
    models = (variant, comparison.dense)
    rows = []
    batches = zip(comparison.ids, final, comparison.dense_final, comparison.counted, strict=True)
    for ids, ours, theirs, counted in batches:
        for row in range(len(ids)):
            one = slice(row, row + 1)
            rows.append(summed_losses(models, (ours[one], theirs[one]), ids[one], counted[one]))
    return rows


def share(dense: Sequence[float], pruned: Sequence[float], ours: Sequence[float]) -> str:
    """Return the share that is back in per cent, with its 95% interval over windows."""
    draws = random.Random(0)
    values = []
    for _ in range(1000):
        chosen = draws.choices(range(len(dense)), k=len(dense))
        lost = sum(pruned[i] - dense[i] for i in chosen)
        values.append(sum(pruned[i] - ours[i] for i in chosen) / lost)
    values.sort()
    point = (sum(pruned) - sum(ours)) / (sum(pruned) - sum(dense))
    return f"{100 * point:.1f} ({100 * values[25]:.0f} to {100 * values[974]:.0f})"


def ignore(event: object) -> None:
    """Say nothing."""


def show(event: object) -> None:
    """Print what a stage says, but for its progress."""
    if "Advanc" not in type(event).__name__:
        print(str(event)[:200], flush=True)


if __name__ == "__main__":
    main()
