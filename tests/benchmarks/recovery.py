"""What recovery gives back of what a removal costs: ours, beside what others published, and bounds no engine loads.

    python tests/benchmarks/recovery.py MODEL DATA --without 5,20,21 --without 9,10,11 [--heal-minutes 0,10]

DATA is a folder with text/enwiki_train.txt, text/enwiki_test.txt and text/c4_50.jsonl. All methods
(`tests/recovery_baselines.py`) fit --samples sequences of the first, let --deciding others decide, are measured on the
other two, and lack the same blocks, such as those of a search: one table for each --without. With --heal-minutes,
`sleb apply --recover --heal` runs too, on three quarters of that text and a quarter of the model's own; 0 minutes are
`--recover` alone.

Each result is saved to WORK/recovery.json as soon as it is measured, by the removed blocks and the method, and the same
command resumes a stopped run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import separated
from saved_work import (
    DENSE,
    TEXTS,
    TRAIN,
    Bench,
    architecture_of,
    how_measured,
    markdown,
    paired,
    parser,
    require_known,
    run_saved,
    run_sleb,
    say,
)

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
from sleb_cli.engine.text.calibration import calibrate_splits, resolve_calibration
from sleb_cli.engine.text.sources import TextSplit
from sleb_cli.engine.text.windows import adds_bos, cut_windows
from sleb_cli.events import ignore
from sleb_cli.requests import CalibrationRequest

FITTED_PART, DECIDING_PART = TextSplit(0, 0.7), TextSplit(0.7, 1)
RESAMPLES = 2000
PRUNED = "pruned"


@dataclass(frozen=True)
class Method:
    """A row of the tables: how it is called, and what it fits; `loads` says whether engines load the result."""

    label: str
    fit: Callable[[FittingText, Sequence[int]], Patch] | None = None
    loads: bool = True


def at_gaps(label: str, fit: Fit, *, loads: bool = True) -> Method:
    return Method(label, partial(fit_gaps, fit=fit), loads)


def closed_form(text: FittingText, removed: Sequence[int]) -> Patch:
    """What `sleb apply --recover` fits."""
    return Patch(recover_in_closed_form(text.skippable, removed, text.train_ids, text.deciding_ids, ignore)[0])


METHODS = {
    "pruned": Method("pruned"),
    "linear-patch": at_gaps("LinearPatch", linear_patch, loads=False),
    "replace-me": at_gaps("ReplaceMe, least squares", replace_me),
    "down-proj": at_gaps("`down_proj` alone", down_proj),
    "closed-form": Method("**`--recover`**", closed_form),
    "ghosted": at_gaps("any matrix (Ghosted Layers)", ghosted, loads=False),
}


class RecoveryBench(Bench):
    def __init__(self, options: argparse.Namespace) -> None:
        setting = {
            "fitted": [options.samples, options.deciding, options.length],
            "windows": [options.windows, options.window_length],
            "dtype": options.dtype,
        }
        super().__init__(options, "recovery", setting, ("results",))

    def results(self, removed: Sequence[int]) -> dict[str, Any]:
        """Return the results without these blocks, by method."""
        key = ",".join(map(str, sorted(removed))) or DENSE
        found: dict[str, Any] = self.work.data["results"].setdefault(key, {})
        return found

    def save_result(self, removed: Sequence[int], method: str, result: dict[str, Any]) -> None:
        self.results(removed)[method] = result
        self.work.save()

    @cached_property
    def skippable(self) -> SkippableModel:
        return self.open(self.architecture)

    def open(self, architecture: Architecture) -> SkippableModel:
        model = self.load(architecture)
        return SkippableModel(model, architecture.blocks_of(model)).__enter__()

    @cached_property
    def text(self) -> FittingText:
        options = self.options
        request = CalibrationRequest(calibration=str(options.data / TRAIN), sequence_length=options.length)
        settings = resolve_calibration(request, self.architecture)
        parts = ((options.samples, FITTED_PART), (options.deciding, DECIDING_PART))
        splits = [replace(settings, samples=samples, split=part) for samples, part in parts]
        train, deciding = (
            drawn.sequences.to(self.skippable.device)
            for drawn in calibrate_splits(splits, self.tokenizer, lambda: self.skippable.model, ignore)
        )
        say(f"the dense states on {len(train)} + {len(deciding)} x {options.length} tokens")
        return FittingText(self.skippable, train, deciding, options.batch)

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Windows of each text, each beginning with BOS if the tokenizer's texts do."""
        bos, length = adds_bos(self.tokenizer), self.options.window_length
        drawn = self.drawn_windows(lambda text: cut_windows(self.tokenizer, text, length, bos=bos))
        return {name: windows.to(self.skippable.device) for name, windows in drawn.items()}

    @cached_property
    def dense_final(self) -> dict[str, list[Tensor]]:
        run = partial(final_states, self.skippable, (), Patch())
        return {
            name: [run(ids) for ids in torch.split(windows, self.options.batch)]
            for name, windows in self.windows.items()
        }

    def measure(
        self, variant: Variant, run: Callable[[Tensor], Tensor], seconds: float, removed: Sequence[int], method: str
    ) -> None:
        """Measure a model on every window, and save what was found; `run` returns its final states."""
        dense, texts = Variant(self.skippable), {}
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
            loss, divergence = ([total / len(positions) for total in column] for column in zip(*totals, strict=True))
            texts[name] = {"loss": loss, "divergence": divergence}
        self.save_result(removed, method, {"seconds": seconds, "texts": texts})
        means = {name: [statistics.fmean(values) for values in of_text.values()] for name, of_text in texts.items()}
        say("  " + ", ".join(f"{name} {loss:.3f} nats, KL {kl:.3f}" for name, (loss, kl) in means.items()))

    def measure_patched(self, removed: Sequence[int], method: str, patch: Patch, seconds: float = 0.0) -> None:
        run = partial(final_states, self.skippable, removed, patch)
        self.measure(Variant(self.skippable, removed, patch.values), run, seconds, removed, method)

    def fit(self, removed: Sequence[int], method: str) -> None:
        """Fit and measure one method."""
        fit = METHODS[method].fit
        if fit is None:
            self.measure_patched(removed, method, Patch())
            return
        seconds = 0.0 if fit is closed_form else self.text.seconds  # it runs the dense model itself
        start = time.monotonic()
        try:
            patch = fit(self.text, removed)
        except Unavailable as reason:
            self.save_result(removed, method, {"unavailable": str(reason)})
            return
        self.measure_patched(removed, method, patch, seconds + time.monotonic() - start)

    def heal(self, removed: Sequence[int], minutes: float, method: str) -> None:
        """Recover and heal through the command line, and measure the checkpoint."""
        options = self.options
        folder = self.work.folder / f"{method}-{'-'.join(map(str, sorted(removed)))}"
        timing = folder.with_suffix(".seconds")
        if not folder.exists():
            start = time.monotonic()
            run_sleb(
                "apply", options.model, "--blocks", ",".join(map(str, removed)), "--recover",
                *(["--heal", "--heal-minutes", minutes] if minutes else []),
                "--calibration", f"{options.data / TRAIN}:0.75,self:0.25",
                "--samples", math.ceil(options.samples / 0.7), "--sequence-length", options.length,
                "--device", options.device, "-o", folder, "-q", "--no-verify",
            )  # fmt: skip
            timing.write_text(f"{time.monotonic() - start:.0f}")
        healed = Variant(self.open(architecture_of(folder)))
        with torch.inference_mode():
            self.measure(healed, healed.final_states, float(timing.read_text()), removed, method)
        free_memory()


# Results as numbers.


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two means over the same windows, and the ends of its 95 % interval (bootstrap of windows)."""
    both = torch.tensor([above, below], dtype=torch.float64)
    drawn = torch.randint(both.shape[1], (RESAMPLES, both.shape[1]), generator=torch.Generator().manual_seed(0))
    above_mean, below_mean = both[:, drawn].mean(-1)
    low, high = (above_mean / below_mean).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(both[0].mean() / both[1].mean()), low, high


def cells(found: dict[str, Any], dense: dict[str, Any], pruned: dict[str, Any], name: str) -> list[str]:
    """Return what a method's row says of one text."""
    ours, theirs, whole = (result["texts"][name] for result in (found, pruned, dense))
    nats = f"{statistics.fmean(ours['loss']):.3f}"
    divergence = f"{statistics.fmean(ours['divergence']):.3f}"
    if ours is theirs or ours is whole:
        return [nats, "", divergence, ""]
    difference, error = paired(ours["loss"], theirs["loss"])
    cost, error_of_cost = paired(theirs["loss"], whole["loss"])
    return [
        f"{nats} ({difference:+.3f} ± {error:.3f})",
        percent(*share_back(found, dense, pruned, name)) if cost > 2 * error_of_cost else "nothing lost",
        divergence,
        percent(*ratio_of_means(ours["divergence"], theirs["divergence"])),
    ]


def share_back(
    found: dict[str, Any], dense: dict[str, Any], pruned: dict[str, Any], name: str
) -> tuple[float, float, float]:
    """Return the share of the nats lost on a text that a method gives back, and the ends of its 95 % interval."""
    now, lost, whole = (result["texts"][name]["loss"] for result in (found, pruned, dense))
    back = [before - after for before, after in zip(lost, now, strict=True)]
    return ratio_of_means(back, [before - kept for before, kept in zip(lost, whole, strict=True)])


def percent(value: float, low: float, high: float) -> str:
    return f"**{value * 100:.0f}** ({low * 100:.0f} to {high * 100:.0f})"


def table(bench: RecoveryBench, removed: Sequence[int]) -> str:
    """Return the Markdown table of all methods without these blocks."""
    results, dense = bench.results(removed), bench.results(())[DENSE]
    columns = ("nats (more than pruned)", "% of lost nats back", "KL", "% of KL left")
    header = ["method", *(f"{name}, {column}" for name in TEXTS for column in columns), "seconds"]
    healed = {heal_name(minutes): Method(heal_label(minutes)) for minutes in bench.options.heal_minutes}
    rows, notes = [], []
    for name, method in {DENSE: Method("dense"), **METHODS, **healed}.items():
        found = dense if name == DENSE else results.get(name)
        if found is None:
            continue
        if "unavailable" in found:
            notes.append(f"\nWithout {method.label}: {found['unavailable']}.")
            continue
        of_texts = [cell for text in TEXTS for cell in cells(found, dense, results[PRUNED], text)]
        seconds = f"{found['seconds']:.0f}" if found["seconds"] else ""
        rows.append([method.label + ("" if method.loads else " †"), *of_texts, seconds])
    return "\n".join([markdown(header, rows), *notes])


def heal_name(minutes: float) -> str:
    return f"heal-{minutes:g}"


def heal_label(minutes: float) -> str:
    return f"**`--recover --heal`**, {minutes:g} minutes" if minutes else "**`--recover`**, a quarter of its own text"


def report(bench: RecoveryBench) -> str:
    """Return a table for each set of removed blocks, and how it was measured."""
    options = bench.options
    decide = ("samples", "deciding", "length", "windows", "window_length", "dtype", "heal_minutes")
    lines = [
        "Nats per token, and how many more than pruned, paired over windows, with the standard error; shares with 95 % "
        "intervals (bootstrap of windows); KL(dense || model) in nats. † is a bound, or needs code of its own to run.",
        "",
        *how_measured(options, "recovery.py", decide),
    ]
    for removed in options.without:
        if PRUNED in bench.results(removed):
            lines += ["", f"### Without {named(removed)}", "", table(bench, removed)]
    return "\n".join(lines)


def named(removed: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(removed)))


def parse() -> argparse.Namespace:
    sizes = {"samples": 96, "deciding": 24, "batch": 8}
    found = parser(__doc__, work=Path("recovery"), **sizes, methods=list(METHODS))
    found.add_argument(
        "--without", type=separated(int), action="append", required=True, help="blocks to remove: 5,20,21"
    )
    found.add_argument("--heal-minutes", type=separated(float), default=[], help="also heal for these minutes: 0,10,60")
    options = found.parse_args()
    require_known(found, "method", options.methods, list(METHODS))
    return options


def measure_all(bench: RecoveryBench) -> None:
    """Fit and measure what is missing."""
    options, results = bench.options, bench.results
    with torch.inference_mode():
        if DENSE not in results(()):
            say(DENSE)
            bench.measure_patched((), DENSE, Patch())
        for removed in options.without:
            for method in dict.fromkeys([PRUNED, *options.methods]):
                if method not in results(removed):
                    say(f"without {named(removed)}: {method}")
                    bench.fit(removed, method)
    for removed in options.without:
        for minutes in options.heal_minutes:
            if (method := heal_name(minutes)) not in results(removed):
                say(f"without {named(removed)}: {method}")
                bench.heal(removed, minutes, method)


def main() -> None:
    run_saved(RecoveryBench(parse()), measure_all, report)


if __name__ == "__main__":
    main()
