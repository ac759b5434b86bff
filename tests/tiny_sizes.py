"""Sizes at which the program takes another path, so small that tiny models cross all of them.

The fixture `tiny_sizes` gives them to a test instead of the usual ones. Nothing that a user sees
may depend on them.

Not here are
- limits above which something is refused: what is over them does not go another way, and
tests/faults crosses them;
- numbers that the documents or a record name, or that decide a result: samples and lengths by
default, the proof's
  prompt, looks of a race, resamples, ranks, ridges, the tokens of a batch that recovery fits or
  trains on, or that is sampled at once;
- what the machine decides: alignments, and how much memory is free, for which tests give
`--memory`;
- how much is shown: lines of a message, columns of a chart, tables of a report.
"""

from collections.abc import Mapping
from typing import Any

# The logits of 24 positions at a time, and of those, 7 of the tiny models' 320 tokens in float32.
_OF_A_DEVICE = {
    "tokens_per_batch": 64,
    "min_tokens_per_batch": 32,
    "head_positions": 24,
    "widened_bytes": 7 * 4 * 320,
}

TINY: Mapping[str, Mapping[str, Any]] = {
    # Files: what is read, copied, compared and written at a time.
    "files.copying": {"BUFFER_BYTES": 64},
    # Forward passes: sequences in a batch, positions and rows of logits at a time, what is kept and
    # checked.
    "forward.ending": {"CHECKED_POSITIONS": 6},
    "forward.fork_check": {"CHECKED_CANDIDATES": 2, "CHECKED_SEQUENCES": 1},
    "forward.stores": {"MAX_SHARED": 1},
    "forward.memory_budget": {"CPU_SETTINGS": _OF_A_DEVICE, "MIN_POSITIONS": 3},
    "forward.passes": {"KEPT_DEPTHS": 1},
    "quality.texts": {"CHECKED_TOKENS": 6, "TOKENS_PER_PART": 100},
    "quality.lm_eval_tasks": {"MAX_BATCH": 2, "CPU_BATCH": 2, "WRITING_BATCH": 3},
    # Recovery: positions at a time.
    "recovery.variant": {"POSITIONS": 24, "BATCH_TOKENS": 48},
    # What is saved after a while is saved at once.
    "search.journal": {"SECONDS_BETWEEN_SYNCS": 0.0},
}
"""The tiny values by module of the engine and name; a mapping changes fields of a dataclass."""
