"""What recovery gives back of what a removal costs: ours, beside what others published, and bounds no engine loads.

    python tests/benchmarks/recovery.py MODEL DATA --without 5,20,21 --without 9,10,11 [--heal-minutes 0,10]

DATA is a folder with text/enwiki_train.txt, text/enwiki_test.txt and text/c4_50.jsonl. All methods
(`tests/recovery_baselines.py`) fit --samples sequences of the first, let --validation others decide, are measured on
the other two, and lack the same blocks, such as those of a search: one table for each --without. With --heal-minutes,
`sleb apply --recover --heal` runs too, on three quarters of that text and a quarter of the model's own; 0 minutes are
`--recover` alone.

Each result is saved to WORK/recovery.json as soon as it is measured, by the removed blocks and the method, and the same
command resumes a stopped run.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saved_work import LONG, TEXTS, TRAIN, Bench, architecture_of, markdown, paired, parser, run_sleb, say, separated

from recovery_baselines import (
    Fit,
    FittingText,
    Patch,
    Unavailable,
    down_proj,
    final_states,
    fit_gaps,
    ghosted,
    linear_patch,
    replace_me,
)
from sleb_cli.engine.device import free_memory
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.calibration import calibrate_splits
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.text.sources import TextSplit
from sleb_cli.events import ignore

TRAIN_PART, VALIDATION_PART = TextSplit(0, 0.7), TextSplit(0.7, 1)
RESAMPLES = 2000
DENSE, PRUNED, OURS = "dense", "pruned", "**`--recover`**"
AT_GAPS: dict[str, Fit] = {
    "LinearPatch †": linear_patch,
    "ReplaceMe, least squares": replace_me,
    "`down_proj` alone": down_proj,
    "any matrix (Ghosted Layers) †": ghosted,
}


class RecoveryBench(Bench):
    name = "recovery"
    setting = ("samples", "validation", "length", "windows", "window_length", "dtype")

    @cached_property
    def skippable(self) -> SkippableModel:
        return self.open(self.architecture)

    def open(self, architecture: Architecture) -> SkippableModel:
        model = self.load(architecture)
        return SkippableModel(model, architecture.blocks_of(model)).__enter__()

    @cached_property
    def text(self) -> FittingText:
        options = self.options
        text = str(self.source / TRAIN)
        settings = resolve_calibration(self.architecture, text, sequence_length=options.length)
        parts = ((options.samples, TRAIN_PART), (options.validation, VALIDATION_PART))
        splits = [replace(settings, samples=samples, split=part) for samples, part in parts]
        train, validation = (
            drawn.sequences.to(self.skippable.device)
            for drawn in calibrate_splits(splits, self.tokenizer, lambda: self.skippable.model, ignore)
        )
        say(f"the dense states on {len(train)} + {len(validation)} x {options.length} tokens")
        return FittingText(self.skippable, train, validation, options.batch)

    @cached_property
    def dense_final(self) -> dict[str, list[Tensor]]:
        run = partial(final_states, self.skippable, (), Patch())
        return {
            name: [run(ids) for ids in torch.split(windows, self.options.batch)]
            for name, windows in self.windows.items()
        }

    @torch.inference_mode()
    def save_measured(
        self, removed: Sequence[int], method: str, variant: Variant, run: Callable[[Tensor], Tensor], seconds: float
    ) -> None:
        """Measure a model on every window, and save what was found; `run` returns its final states."""
        dense, result = Variant(self.skippable), {"seconds": seconds}
        for name, windows in self.windows.items():
            positions = torch.arange(windows.shape[1] - 1, device=windows.device)
            totals = []
            batches = zip(torch.split(windows, self.options.batch), self.dense_final[name], strict=True)
            for ids, theirs in batches:
                ours = run(ids)
                totals += [
                    summed_losses(variant, dense, ours[[row]], theirs[[row]], ids[[row]], positions)
                    for row in range(len(ids))
                ]
            loss, divergence, _ = ([total / len(positions) for total in column] for column in zip(*totals, strict=True))
            result[name] = {"loss": loss, "divergence": divergence}
            say(f"  {name} {statistics.fmean(loss):.3f} nats, KL {statistics.fmean(divergence):.3f}")
        self.save(removed, method, result)

    @torch.inference_mode()
    def fit(self, removed: Sequence[int], method: str) -> None:
        """Fit and measure one method."""
        text, patch = self.text, Patch()
        start = time.monotonic()
        if method == OURS:
            values, *_ = recover_in_closed_form(self.skippable, removed, text.train_ids, text.validation_ids, ignore)
            patch = Patch(values)
        elif method in AT_GAPS:
            start -= text.seconds
            try:
                patch = fit_gaps(text, removed, AT_GAPS[method])
            except Unavailable as reason:
                self.save(removed, method, {"unavailable": str(reason)})
                return
        seconds = time.monotonic() - start
        run = partial(final_states, self.skippable, removed, patch)
        self.save_measured(removed, method, Variant(self.skippable, removed, patch.values), run, seconds)

    def heal(self, removed: Sequence[int], method: str, minutes: str) -> None:
        """Recover and heal through the command line, and measure the checkpoint."""
        options, folder, start = self.options, self.work / "healed", time.monotonic()
        run_sleb(
            "apply", options.model, "--blocks", ",".join(map(str, removed)), "--recover",
            *(["--heal", "--heal-minutes", minutes] if minutes != "0" else []),
            "--calibration", f"{self.source / TRAIN}:0.75,self:0.25",
            "--samples", math.ceil(options.samples / 0.7), "--sequence-length", options.length,
            "--device", options.device, "-o", folder, "-q", "--no-verify", "--force",
        )  # fmt: skip
        seconds = time.monotonic() - start
        healed = Variant(self.open(architecture_of(folder)))
        self.save_measured(removed, method, healed, healed.final_states, seconds)
        free_memory()

    def measure(self) -> None:
        healing = {f"**`--recover`**, {minutes} minutes of `--heal`": minutes for minutes in self.options.heal_minutes}
        for removed in [(), *self.options.without]:
            for method in [PRUNED, *AT_GAPS, OURS, *healing] if removed else [DENSE]:
                if method in self.of(removed):
                    continue
                say(f"without {removed}: {method}")
                if method in healing:
                    self.heal(removed, method, healing[method])
                else:
                    self.fit(removed, method)

    def report(self) -> Iterator[str]:
        yield (
            "Nats per token, and how many more than pruned, paired over windows, with the standard error; shares with "
            "95 % intervals (bootstrap of windows); KL(dense || model) in nats. † is a bound, or needs code of its own "
            "to run."
        )
        yield self.how_measured("heal_minutes")
        for removed in self.options.without:
            if PRUNED in self.of(removed):
                yield f"### Without {', '.join(map(str, sorted(removed)))}"
                yield table(self.of(()) | self.of(removed))


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> str:
    """Return the ratio of two means over the same windows, in per cent with a 95 % interval (bootstrap of windows)."""
    both = torch.tensor([above, below], dtype=torch.float64)
    drawn = torch.randint(both.shape[1], (RESAMPLES, both.shape[1]), generator=torch.Generator().manual_seed(0))
    above_mean, below_mean = both[:, drawn].mean(-1)
    low, high = (above_mean / below_mean).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"**{both[0].mean() / both[1].mean() * 100:.0f}** ({low * 100:.0f} to {high * 100:.0f})"


def cells(ours: dict[str, Any], pruned: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """Return what a method's row says of one text."""
    nats, divergence = (f"{statistics.fmean(ours[what]):.3f}" for what in ("loss", "divergence"))
    if ours in (pruned, dense):
        return [nats, "", divergence, ""]
    difference, error = paired(ours["loss"], pruned["loss"])
    cost, error_of_cost = paired(pruned["loss"], dense["loss"])
    back = [before - after for before, after in zip(pruned["loss"], ours["loss"], strict=True)]
    lost = [before - kept for before, kept in zip(pruned["loss"], dense["loss"], strict=True)]
    return [
        f"{nats} ({difference:+.3f} ± {error:.3f})",
        ratio_of_means(back, lost) if cost > 2 * error_of_cost else "nothing lost",
        divergence,
        ratio_of_means(ours["divergence"], pruned["divergence"]),
    ]


def table(results: dict[str, Any]) -> str:
    """Return the Markdown table of the results without some blocks, by method."""
    columns = ("nats (more than pruned)", "% of lost nats back", "KL", "% of KL left")
    header = ["method", *(f"{name}, {column}" for name in TEXTS for column in columns), "seconds"]
    rows, notes = [], ""
    for method, found in results.items():
        if "unavailable" in found:
            notes += f"\n\nWithout {method}: {found['unavailable']}."
            continue
        of_texts = [
            cell for text in TEXTS for cell in cells(*(of[text] for of in (found, results[PRUNED], results[DENSE])))
        ]
        rows.append([method, *of_texts, f"{found['seconds']:.0f}"])
    return markdown(header, rows) + notes


def main() -> None:
    sizes = {"samples": 96, "validation": 24, "batch": 8}
    found = parser(__doc__, "model", "data", work="recovery", **LONG, **sizes, heal_minutes=[])
    found.add_argument(
        "--without", type=separated(int), action="append", required=True, help="blocks to remove: 5,20,21"
    )
    RecoveryBench(found.parse_args()).run()


if __name__ == "__main__":
    main()
