"""Our own lm-eval tasks for what depth pruning breaks first; `--tasks canaries` runs them.

A model without some of its blocks may no longer add, copy or do as it is told. Perplexity and
multiple choice hide that: Shrestha et al., arXiv:2602.01997; ShortOPD, arXiv:2607.13124. lm-eval's
own command runs them, too: `lm-eval run --include_path FOLDER --tasks sleb_canaries`.
"""

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the task files are."""

CANARIES = ("sleb_sums", "sleb_lists", "sleb_repeat_64")
"""The names of the tasks of the group."""

INSTRUCTIONS = "sleb_instructions"
"""Not in the group: only a chat model does what it is asked, and only in its chat template."""

LOOPS = "sleb_loops"
"""Not in the group: its long answers take minutes to hours."""

PRESETS: Mapping[str, tuple[str, ...]] = {
    # The five of Song et al., SLEB (ICML 2024, arXiv:2402.09025), without examples, which is
    # lm-eval's default.
    "sleb": ("piqa", "winogrande", "hellaswag", "arc_challenge", "arc_easy"),
    # What depth pruning breaks first; they need no data set.
    "canaries": CANARIES,
    # lm-eval's groups for the two Open LLM Leaderboards, with the leaderboards' numbers of
    # examples.
    "leaderboard-v1": ("openllm",),
    "leaderboard-v2": ("leaderboard",),
}
"""Names for several tasks or groups."""
