"""Tasks for lm-eval of what depth pruning breaks first, with items of our own; `--tasks canaries` runs them.

Perplexity and multiple choice hide that a model without some of its blocks no longer adds, closes brackets, copies or
writes at length: Shrestha et al., arXiv:2602.01997; ShortOPD, arXiv:2607.13124. Also for lm-eval's own command:
`lm-eval run --include_path FOLDER --tasks sleb_canaries`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the task files are."""

CANARIES = (
    "sleb_sums",
    "sleb_sums_sampled",
    "sleb_brackets",
    "sleb_brackets_sampled",
    "sleb_lists",
    "sleb_counting",
    "sleb_repeat_64",
    "sleb_repeat_256",
    "sleb_repeat_1024",
    "sleb_repetition",
)
"""The names of the tasks."""
