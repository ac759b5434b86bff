"""Sizes at which the program takes another path, so small that tiny models cross all of them.

With the environment variable TINY_SIZES, every process of a test has these instead of the usual ones, from the moment
at which it imports their modules: `TINY_SIZES=1 pytest tests/cli`. Nothing that a user sees may depend on them.

Not here are
- limits above which something is refused (`LONGEST_LINE`, `_LONGEST_JSON`, `records.LARGEST`): what is over them does
  not go another way, and tests/faults crosses them;
- numbers that the documents or a record name, or that decide a result: samples and lengths by default, the proof's
  prompt, the samples of a fingerprint, looks of a race, resamples, ranks, ridges, the tokens of a step of training,
  how much is timed to predict a speed;
- what the machine decides: alignments, and how much memory is free, for which tests give `--memory`;
- how much is shown: lines of a message, columns of a chart, tables of a report.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TINY_SIZES"
ARE_TINY = bool(os.environ.get(VARIABLE))

# The logits of 24 positions at a time, and of those, 7 of the tiny models' 320 tokens in float32.
_OF_A_DEVICE = {
    "tokens_per_batch": 64, "min_tokens_per_batch": 32, "head_positions": 24, "widened_bytes": 7 * 4 * 320
}  # fmt: skip

TINY: Mapping[str, Mapping[str, Any]] = {
    # Files: what is read, copied, compared and written at a time.
    "sleb_cli.engine.files.copying": {"BUFFER_BYTES": 64, "_CHUNK_BYTES": 1_000},
    "sleb_cli.engine.files.fingerprint": {"HEAD_BYTES": 100},  # behind it, only samples are read
    "sleb_cli.engine.output.proof": {"LARGEST_SHARD_BYTES": 10_000},
    "sleb_cli.requests": {"DEFAULT_SHARD_SIZE": "10kB"},
    # Forward passes: sequences in a batch, positions and rows of logits at a time, what is kept and checked.
    "sleb_cli.engine.forward.fork_check": {"CHECKED_CANDIDATES": 2, "CHECKED_SEQUENCES": 1, "CHECKED_POSITIONS": 6},
    "sleb_cli.engine.forward.holding": {"MOST_SHARED": 1},
    "sleb_cli.engine.forward.memory_budget": {
        "CPU_SETTINGS": _OF_A_DEVICE, "MPS_SETTINGS": _OF_A_DEVICE, "ACCELERATOR_SETTINGS": _OF_A_DEVICE,
        "FEWEST_POSITIONS": 3,
    },
    "sleb_cli.engine.forward.passes": {"KEPT_DEPTHS": 1},
    "sleb_cli.engine.model.sampling": {"_CHUNK_TOKENS": 7},
    "sleb_cli.engine.quality.texts": {"CHECKED_TOKENS": 6, "TOKENS_OF_A_PART": 100},
    "sleb_cli.engine.text.writing": {"_MIN_BATCH": 5, "_MAX_BATCH": 7, "_TOKENS_PER_BATCH": 200},
    "sleb_cli.engine.speed.engines.llama_cpp": {"_BATCH_TOKENS": 8},
    "sleb_cli.engine.quality.lm_eval_tasks": {"LARGEST_BATCH": 2, "CPU_BATCH": 2, "WRITING_BATCH": 3},
    "sleb_cli.engine.quality.task_metric": {"BATCH_SIZE": 2},
    # Recovery: batches, positions and columns at a time, portions of text.
    "sleb_cli.engine.recovery.closed_form": {"BATCH_TOKENS": 64, "GROUPS": 3, "DECIDING_POSITIONS": 32},
    "sleb_cli.engine.recovery.heal": {"PORTION_TOKENS": 1_024, "CHECKED_TOKENS": 64},
    "sleb_cli.engine.recovery.least_squares": {"PANEL_COLUMNS": 7},
    "sleb_cli.engine.recovery.low_rank": {"ROWS_AT_ONCE": 7},
    "sleb_cli.engine.recovery.variant": {"POSITIONS": 24},
    # What is saved after a while is saved at once.
    "sleb_cli.engine.search.journal": {"SECONDS_BETWEEN_SYNCS": 0.0},
}  # fmt: skip
"""The tiny values by module and name; a mapping changes fields of a dataclass."""


def shrink(module: ModuleType) -> None:
    """Give the sizes of a module their tiny values.

    Raises:
        AttributeError: it has no such size.
    """
    for name, value in TINY[module.__name__].items():
        usual = getattr(module, name)
        setattr(module, name, replace(usual, **value) if isinstance(value, Mapping) else value)


class _Shrinking(PathFinder):
    """Finds the modules of the table as Python does, and shrinks their sizes before anything imports these."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in TINY else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_shrink(module: ModuleType) -> None:
                run(module)
                shrink(module)

            spec.loader.exec_module = run_and_shrink  # type: ignore[method-assign]
        return spec


def start() -> None:
    """Shrink the sizes of all modules of the table, those that are imported already first."""
    for name in TINY.keys() & sys.modules.keys():
        shrink(sys.modules[name])
    sys.meta_path.insert(0, _Shrinking)


def for_children(folder: Path, patch: Any) -> None:
    """Let every new process do the same, before it imports anything else.

    Args:
        folder: an empty folder.
        patch: pytest's MonkeyPatch.
    """
    (folder / "sitecustomize.py").write_text("import tiny_sizes\n\ntiny_sizes.start()\n")
    for place in (folder, Path(__file__).parent):
        patch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)


if ARE_TINY:
    start()
