"""Calibration sequences that are never searched on: whether what the search gained there holds elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sleb_cli.engine.search.race import student_quantile
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.plan import HeldOutRecord, Step
from sleb_plugins import UsageError

ERROR = 0.05
"""How often a search is warned of at most whose losses part by chance alone, as far as differences are normal."""

# With less freedom than this, an error is not known well enough to say anything.
LEAST_FREEDOM = 3

Losses = Callable[[Sequence[int]], Sequence[float]]
"""From the blocks that are gone to the loss of each sequence, in nats per token."""


def hold_out(calibration: Calibration, share: float) -> tuple[Calibration, Calibration | None]:
    """Split off a share of the sequences: the last ones, rounded, at least one, and at least one is left.

    Those of a mixture are spread so that the last ones hold one of each source, where there are as many. Of a text,
    they are what stands furthest behind.

    Raises:
        UsageError: a single sequence cannot be split.
    """
    if not share:
        return calibration, None
    count = len(calibration.sequences)
    if count < 2:
        raise UsageError("One calibration sequence cannot be split.", hint="Leave out --holdout, or use more text.")
    kept = count - min(max(1, round(share * count)), count - 1)
    return calibration.part(slice(0, kept)), calibration.part(slice(kept, None))


@dataclass(frozen=True)
class HeldOut:
    """Compares, size by size, how the loss has grown on the sequences searched and on those held out.

    `steps` is how many comparisons there will be.
    """

    searched: Losses
    held_out: Losses
    steps: int

    def dense(self) -> HeldOutRecord:
        """Measure the dense model."""
        loss = statistics.fmean(self.held_out(()))
        return HeldOutRecord(loss=loss, perplexity=math.exp(loss))

    def compare(self, removed: Sequence[int], perplexity: Callable[[float], float]) -> HeldOutRecord:
        """Measure the model without the removed blocks, and say whether its losses part."""
        losses = self.held_out(removed)
        generalization_gap, error, overfits = compare_growth(
            _growth(self.searched(()), self.searched(removed)), _growth(self.held_out(()), losses), ERROR / self.steps
        )
        loss = statistics.fmean(losses)
        return HeldOutRecord(
            loss=loss,
            perplexity=perplexity(loss),
            generalization_gap=generalization_gap,
            standard_error=error,
            overfits=overfits,
        )


def overfitting_note(steps: Sequence[Step]) -> str | None:
    """Say where the losses part first, if they do."""
    for number, step in enumerate(steps, start=1):
        found = step.held_out
        if found is not None and found.overfits:
            return (
                f"From step {number} on, the search fits its own text: on the sequences that were held out, the loss "
                f"has grown by {found.generalization_gap:.3f} nats per token more than on those searched, "
                f"{found.generalization_gap / found.standard_error:.1f} standard errors. "
                "More or other calibration text may help."
            )
    return None


def _growth(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def compare_growth(searched: Sequence[float], held_out: Sequence[float], tail: float) -> tuple[float, float, bool]:
    """Say by how much more the sequences held out have lost, its standard error, and whether chance explains it not.

    Each sequence is paired with itself in the dense model, so how hard it is cancels out. If neither part were
    favoured, all would scatter alike: the error is that of a difference of two means with one pooled variance
    (Student's t).

    Args:
        searched: what each sequence that was searched on lost, in nats per token.
        held_out: the same of each that was not.
        tail: how often chance alone may count.
    """
    generalization_gap = statistics.fmean(held_out) - statistics.fmean(searched)
    freedom = len(searched) + len(held_out) - 2
    if freedom < 1:
        return generalization_gap, 0.0, False
    squares = sum(sum((value - statistics.fmean(part)) ** 2 for value in part) for part in (searched, held_out))
    error = math.sqrt(squares / freedom * (1 / len(searched) + 1 / len(held_out)))
    return (
        generalization_gap,
        error,
        freedom >= LEAST_FREEDOM and generalization_gap > student_quantile(tail, freedom) * error,
    )
