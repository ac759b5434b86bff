"""lm-eval's results in files of its own format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sleb_cli.engine.quality.lm_eval_tasks import as_json, quiet
from sleb_plugins.errors import OutputError


def merge_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of several runs on one model as those of one run."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and key != "config":
                merged[key] = merged.get(key, {}) | value
            else:
                merged.setdefault(key, value)
    seconds = sum(float(part["total_evaluation_time_seconds"]) for part in parts)
    return merged | {"total_evaluation_time_seconds": str(seconds)}


def write_lm_eval_results(folder: Path, results: Mapping[str, Any], model_args: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write results as lm-eval's own command does, `results_DATE.json` and `samples_TASK_DATE.jsonl`; return the files.

    `model_args` are those of lm-eval's `--model sleb`, for the record.

    Raises:
        OutputError: the files cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    results = as_json(results)  # a copy, since lm-eval changes what it is given
    samples = results.pop("samples")
    results["config"]["model_args"] = dict(model_args)
    tracker = EvaluationTracker(output_path=str(folder / "results.json"))
    general = tracker.general_config_tracker
    general.log_experiment_args(
        model_source=results["config"]["model"],
        model_args=dict(model_args),
        system_instruction=None,
        chat_template=results.get("chat_template"),
        fewshot_as_multiturn=bool(results.get("chat_template")),
    )
    general.start_time -= float(results["total_evaluation_time_seconds"])
    with quiet():
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, of_task in samples.items():
            tracker.save_results_samples(task_name=name, samples=of_task)
    date = getattr(tracker, "date_id", None)
    files: dict[Path, int | None] = {folder / f"results_{date}.json": None}
    files |= {folder / f"samples_{name}_{date}.jsonl": len(of_task) for name, of_task in samples.items()}
    # lm-eval only logs that it could not write.
    if broken := [file for file, lines in files.items() if not _is_whole(file, lines)]:
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise OutputError(f"{broken[0]} cannot be written.", hint="Check the folder's permissions and free space.")
    return tuple(files)


def _is_whole(file: Path, lines: int | None) -> bool:
    """Whether a file holds this many lines of JSON, or if None, one JSON document."""
    try:
        text = file.read_text(encoding="utf-8")
        found = [json.loads(document) for document in ([text] if lines is None else text.split("\n")[:-1])]
        return len(found) == (1 if lines is None else lines)
    except (OSError, ValueError):
        return False
