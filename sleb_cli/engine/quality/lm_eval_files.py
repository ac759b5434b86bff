"""lm-eval's results in files of its own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from sleb_cli.engine.quality.lm_eval_tasks import as_json, quiet
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.records import without_folders
from sleb_cli.requests import beside
from sleb_plugins.errors import OutputError

LmEvalResults = dict[tuple[int, ...], list[dict[str, Any]]]
"""For each size, lm-eval's own results for each task or group."""


def write_by_lm_eval(file: Path, found: LmEvalResults, subject: Subject) -> tuple[str, ...]:
    """Write what lm-eval's own command would, into a folder next to this file; return the names of the files.

    Raises:
        OutputError: they cannot be written.
    """
    files: list[Path] = []
    for removals, results in found.items():
        folder = beside(file, ".lm-eval") / (f"{len(removals)}-removed" if removals else "dense")
        model_args: dict[str, Any] = {"model": without_folders(subject.architecture.source.id)}
        if removals and subject.file is not None:
            model_args = {"plan": subject.file.name, "remove": len(removals)}
        elif removals:
            model_args["blocks"] = "+".join(map(str, removals))
        files += write_lm_eval_results(folder, results, model_args)
    return tuple(str(written.relative_to(file.parent)) for written in files)


def write_lm_eval_results(
    folder: Path, runs: Sequence[Mapping[str, Any]], model_args: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write the results of several runs on one model as lm-eval's own command does those of one; return the files.

    They are `results_DATE.json` and `samples_TASK_DATE.jsonl`; `model_args` are those of lm-eval's `--model sleb`.

    Raises:
        OutputError: the files cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker, evaluation_tracker

    results: dict[str, Any] = {}
    for run in runs:
        for key, value in as_json(run).items():  # a copy, since lm-eval changes what it is given
            if isinstance(value, dict) and key != "config":
                results[key] = results.get(key, {}) | value
            else:
                results.setdefault(key, value)
    seconds = sum(float(run["total_evaluation_time_seconds"]) for run in runs)
    results["total_evaluation_time_seconds"] = str(seconds)
    results["config"]["model_args"] = dict(model_args)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder / "results.json"))
    general = tracker.general_config_tracker
    general.log_experiment_args(
        model_source=results["config"]["model"],
        model_args=dict(model_args),
        system_instruction=None,
        chat_template=results.get("chat_template"),
        fewshot_as_multiturn=bool(results.get("chat_template")),
    )
    general.start_time -= seconds
    # lm-eval only warns that it could not write.
    failure = OutputError(
        f"lm-eval's results cannot be written to {folder}.", hint="Check the folder's permissions and free space."
    )
    try:
        with quiet(), mock.patch.object(evaluation_tracker.eval_logger, "warning", side_effect=failure):
            tracker.save_results_aggregated(results=results, samples=samples)
            for name, of_task in samples.items():
                tracker.save_results_samples(task_name=name, samples=of_task)
    except BaseException:
        with suppress(OSError):
            for file in folder.glob(f"*_{getattr(tracker, 'date_id', None)}.json*"):
                file.unlink()
        raise
    date = tracker.date_id
    return folder / f"results_{date}.json", *(folder / f"samples_{name}_{date}.jsonl" for name in samples)
