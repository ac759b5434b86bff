# ruff: noqa
"""Try ways to recover a pruned model, one row at a time, and keep each row in recovery_trial.csv.

python docs/experiments/recovery_trial.py NAME MODEL BLOCKS ROW --text FOLDER [--minutes M] [--seed N]

NAME is the model's in the table, BLOCKS are such as 17,14,13, and FOLDER holds enwiki_train.txt,
enwiki_test.txt and c4_50.jsonl. A row that stands in the table is not made again.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.door.named_model import resolve_subject
from sleb_cli.engine.door.recovery import resolve_recovery
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.checkpoint import Output
from sleb_cli.engine.recovery.block_regression import BlockRegression, fit_in_rounds
from sleb_cli.engine.recovery.closed_form import ClosedForm
from sleb_cli.engine.recovery.depth import Batches, DepthPair, Judge
from sleb_cli.engine.recovery.flat_weights import RelativeWeights
from sleb_cli.engine.recovery.heal import Heal
from sleb_cli.engine.recovery.heal_budget import HealBudget
from sleb_cli.engine.recovery.recover import _draw_texts, _find_state
from sleb_cli.engine.recovery.stage import Job, Stage
from sleb_cli.engine.recovery.variant import DenseComparison, Losses, Variant, summed_losses
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.plan import LossesRecord
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import ApplyRequest

TABLE = Path(__file__).with_name("recovery_trial.csv")
COLUMNS = (
    "model",
    "blocks",
    "row",
    "seed",
    "minutes",
    "enwiki",
    "enwiki KL left",
    "c4",
    "c4 KL left",
)
WINDOWS = 24
LENGTH = 512
BATCH = 8


@dataclass(frozen=True)
class Local(Stage):
    """Train the block before each gap alone, from bottom to top, to the dense states behind it.

    Attributes:
        epochs: of the text for each window.
        ridge: whether a regression comes first.
        behind: how many blocks behind a gap are trained with the one before it.
        turn: how many epochs each later block is then trained for, alone; 0 for none.
        rate: the highest learning rate, relative to the size of each weight.
    """

    epochs: float = 5
    ridge: bool = True
    behind: int = 0
    turn: float = 0
    rate: float = 5e-3

    title: ClassVar[str] = "Recovery"
    task: ClassVar[str] = "Recovering"
    model: ClassVar[str] = "recovered"
    key: ClassVar[str] = "closed_form"
    streams: ClassVar[bool] = True

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        return {}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        return 0

    def fields(self, done: Any, losses: LossesRecord) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def run(self, job: Job, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        removed = job.settings.surgery.removed
        count = len(job.dense.switches)
        kept = [block for block in range(count) if block not in removed]
        batches = Batches(job, BATCH)
        judge = Judge(job, batches, BATCH)
        best = judge.divergence(batches.entering(), 0, {})
        print(f"divergence {best:.4f}", flush=True)
        new: dict[str, Tensor] = {}
        pair = DepthPair(batches.entering(), batches.entering())
        at = 0
        order = random.Random(0)
        for place, (block, following) in enumerate(pairwise([*kept, count])):
            gap = following - block - 1
            epochs = self.epochs if gap else self.turn
            if not gap and (not epochs or block < min(removed)):
                continue
            if gap and self.behind and not self.turn:
                window = kept[place : place + 1 + self.behind]
            else:
                window = [block]
            if block < at:  # trained with an earlier gap
                window = [number for number in window if number >= at]
                if not window or not any(
                    number in removed for number in range(window[0], following)
                ):
                    continue
            end = window[-1] + 1
            while end in removed:
                end += 1
            dense = batches.run(pair.dense, range(at, end))
            between = [number for number in range(at, window[0]) if number not in removed]
            with job.dense.replaced(new):
                pruned = batches.run(pair.pruned, between)
            began = time.monotonic()
            pair = DepthPair(dense, pruned)
            fitted: dict[str, Tensor] = {}
            if gap and self.ridge:
                regression = BlockRegression(batches, pair, block, new, job.settings.stored)
                fitted = fit_in_rounds(regression.find_projections(), regression.solve)[-1].values
                after = judge.divergence(pair.pruned, window[0], {**new, **fitted})
                print(f"ridge {block}: {after:.4f} ({time.monotonic() - began:.0f} s)", flush=True)
            if epochs:
                fitted |= self._train(job, batches, pair, window, {**new, **fitted}, epochs, order)
            after = judge.divergence(pair.pruned, window[0], {**new, **fitted})
            print(
                f"trained {window} to {end}: {after:.4f} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            if after < best:
                best = after
                new |= fitted
            with job.dense.replaced(new):
                pruned = batches.run(pair.pruned, window)
            pair = DepthPair(dense, pruned)
            at = end
        return new, None

    def _train(
        self,
        job: Job,
        batches: Batches,
        pair: DepthPair,
        window: Sequence[int],
        values: Mapping[str, Tensor],
        epochs: float,
        order: random.Random,
    ) -> dict[str, Tensor]:
        dense = job.dense
        by_id = {id(parameter): name for name, parameter in dense.model.named_parameters()}
        named = {}
        for block in window:
            for parameter in dense.switches[block].block.parameters():
                named[by_id[id(parameter)]] = parameter
        before = {name: parameter.data for name, parameter in named.items()}
        for name, value in values.items():
            if name in named:
                named[name].data = value.to(named[name].dtype)
        weights = RelativeWeights(list(named.values()), job.settings.stored)
        steps = round(epochs * len(batches.train))
        todo: list[int] = []
        total = 0.0
        for step in range(steps):
            if not todo:
                todo = list(batches.train)
                order.shuffle(todo)
                total = 0.0
            batch = todo.pop()
            target = pair.dense[batch].float()
            states = pair.pruned[batch]
            with torch.enable_grad():
                for block in window:
                    states = dense.run_block(batches.calls[batch][block], states)
                error = (states.float() - target).square().mean(-1)
                loss = (error / target.square().mean(-1).clamp_min(1e-6)).mean()
            loss.backward()
            total += float(loss)
            weights.step(self.rate * min(1, (step + 1) / 20) * max(0.05, 1 - step / steps))
        print(f"error {total / max(1, len(batches.train) - len(todo)):.4f}")
        result = {}
        for name, parameter in named.items():
            result[name] = parameter.data
            parameter.requires_grad_(False)
            parameter._post_accumulate_grad_hooks = None
            parameter.data = before[name]
        return result


ROWS: dict[str, tuple[str, list[Stage]]] = {
    "a: closed form": ("chat", [ClosedForm()]),
    "d: ridge, then the block before each gap": ("self", [Local()]),
    "g: d on chats": ("chat", [Local()]),
    "g0: g without a ridge": ("chat", [Local(ridge=False)]),
    "e: g on two blocks": ("chat", [Local(behind=1)]),
    "e0: e without a ridge": ("chat", [Local(ridge=False, behind=1)]),
    "b: closed form, healed": ("chat", [ClosedForm(), Heal(HealBudget(0, None))]),
    "c: healed": ("chat", [Heal(HealBudget(0, None))]),
    "r: ridge at each gap": ("chat", [Local(epochs=0)]),
    "h: r, healed": ("chat", [Local(epochs=0), Heal(HealBudget(0, None))]),
    "hm: h in as long as a": ("chat", [Local(epochs=0), Heal(HealBudget(0, None))]),
    "cm: c in as long as a": ("chat", [Heal(HealBudget(0, None))]),
    "f: g, healed": ("chat", [Local(), Heal(HealBudget(0, None))]),
}


@torch.inference_mode()
def by_window(comparison: DenseComparison, variant: Variant) -> list[Losses]:
    """Return the losses of each window."""
    final = comparison._final_states(variant)
    models = (variant, comparison.dense)
    rows = []
    for ids, ours, theirs, counted in zip(
        comparison.ids, final, comparison.dense_final, comparison.counted, strict=True
    ):
        for row in range(len(ids)):
            one = slice(row, row + 1)
            summed = summed_losses(models, (ours[one], theirs[one]), ids[one], counted[one])
            rows.append(summed)
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


def main() -> None:
    """Make one row."""
    parser = argparse.ArgumentParser()
    for name in ("name", "model", "blocks", "row"):
        parser.add_argument(name)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    (row,) = [row for row in ROWS if row.partition(":")[0] == asked.row]
    key = (asked.name, asked.blocks, row, str(asked.seed))
    if TABLE.exists():
        with TABLE.open() as file:
            if any(
                tuple(line[column] for column in COLUMNS[:4]) == key
                for line in csv.DictReader(file)
            ):
                print("made already")
                return
    kind, stages = ROWS[row]
    for at, stage in enumerate(stages):
        if isinstance(stage, Heal):
            stages[at] = Heal(HealBudget(asked.minutes, None))
    removed = tuple(map(int, asked.blocks.split(",")))
    registry = load_plugins()
    source = locate_model(asked.model, print)
    tokenizer = load_tokenizer(source)
    own = "self-chat" if kind == "chat" and tokenizer.chat_template else "self"
    text = f"{asked.text / 'enwiki_train.txt'}:0.75,{own}:0.25"
    request = ApplyRequest(asked.model, recover=True, calibration=text, seed=asked.seed)
    named = NamedSubject(request, asked.model, removed)
    subject = resolve_subject(named, source, registry, print)
    output = Output(Path("/tmp/no-such-folder/trial"), False)
    settings = resolve_recovery(subject, request, output, lambda event: None)
    settings = replace(settings, stages=tuple(stages))
    surgery = settings.surgery
    with open_model(surgery.architecture, settings.placement, lambda event: None) as dense:
        train, validation, _, _ = _draw_texts(settings, dense, lambda event: None)
        state = _find_state(settings, train, validation)
        state.save = lambda *arguments: None  # type: ignore[method-assign]
        began = time.monotonic()
        values: dict[str, Tensor] = {}
        for stage in stages:
            values, _ = stage.run(Job(settings, dense, train, validation, state, show), values)
        minutes = (time.monotonic() - began) / 60
        cells = []
        for file in ("enwiki_test.txt", "c4_50.jsonl"):
            held_out = resolve_calibration(
                surgery.architecture, str(asked.text / file), WINDOWS, LENGTH, 0
            )
            (drawn,) = calibrate([held_out], tokenizer, lambda: None, lambda event: None)
            compared = DenseComparison(Variant(dense), drawn)
            with surgery.simulate(dense.model):
                rows = [
                    by_window(compared, variant)
                    for variant in (
                        Variant(dense),
                        Variant(dense, surgery.removed),
                        Variant(dense, surgery.removed, values),
                    )
                ]
            losses = [[window.loss for window in windows] for windows in rows]
            cells.append(share(losses[0], losses[1], losses[2]))
            left = [sum(window.divergence for window in windows) for windows in rows]
            cells.append(f"{100 * left[2] / left[1]:.1f}")
    line = [*key, f"{minutes:.1f}", *cells]
    print(line)
    is_new = not TABLE.exists()
    with TABLE.open("a") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(line)


def show(event: object) -> None:
    """Print what a stage says, but for its progress."""
    if "Advanc" not in type(event).__name__:
        print(str(event)[:200], flush=True)


if __name__ == "__main__":
    main()
