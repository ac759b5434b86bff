"""Calibration sequences that are held out tell whether a search overfits its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from scipy.special import stdtrit

from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.plan import Step
from sleb_plugins import UsageError

MAX_ERROR_RATE = 0.05
"""At most this share of searches is flagged by chance alone, if differences are normally
distributed.
"""

# With fewer degrees of freedom, the standard error is too uncertain to conclude anything.
MIN_DEGREES_OF_FREEDOM = 3


def hold_out(calibration: Calibration, share: float) -> tuple[Calibration, Calibration | None]:
    """Split off the last `share` of the sequences, rounded; both parts keep at least one."""
    # A mixture is interleaved, so its last sequences include each source if there are enough of
    # them.
    if not share:
        return calibration, None
    count = len(calibration.sequences)
    if count < 2:
        raise UsageError(
            "A single calibration sequence cannot be split.",
            hint="Leave out --holdout, or use more text.",
        )
    searched = count - min(max(1, round(share * count)), count - 1)
    return calibration.select(range(searched)), calibration.select(range(searched, count))


def overfitting_note(steps: Sequence[Step]) -> str | None:
    """Name the first step that overfits in a warning, if there is one."""
    for number, step in enumerate(steps, start=1):
        record = step.held_out
        if record is not None and record.overfits:
            unit = "nats per token" if record.distance is None else "in distance"
            return (
                f"The search overfits its calibration text from step {number}: the loss grew by "
                f"{record.generalization_gap:.3f} {unit} more on the held-out sequences "
                "than on those searched "
                f"({record.generalization_gap / record.standard_error:.1f} standard errors). "
                "More or different calibration text may help."
            )
    return None


def overfitting_test(
    searched: Sequence[float], held_out: Sequence[float], tail: float
) -> tuple[float, float, bool]:
    """Return the generalization gap, its standard error, and whether it is more than chance.

    `searched` and `held_out` are increases of each sequence's loss over the dense model's, in nats
    per token, so that its difficulty cancels out. If the search favoured neither part, both would
    have the same variance, so this is Student's t-test of two means with a pooled variance; `tail`
    is the allowed probability of a false positive.
    """
    generalization_gap = fmean(held_out) - fmean(searched)
    freedom = len(searched) + len(held_out) - 2
    if freedom < 1:
        return generalization_gap, 0.0, False
    squares = 0.0
    for increases in (searched, held_out):
        mean = fmean(increases)
        squares += sum((increase - mean) ** 2 for increase in increases)
    error = math.sqrt(squares / freedom * (1 / len(searched) + 1 / len(held_out)))
    limit = float(stdtrit(freedom, 1 - tail)) * error
    overfits = freedom >= MIN_DEGREES_OF_FREEDOM and 0 < limit < generalization_gap
    return generalization_gap, error, overfits
