"""The error on the items of an lm-eval task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_cli.requests import EvalRequest
from sleb_plugins.errors import DataError, UsageError
from sleb_plugins.hookspecs import hookimpl
from sleb_plugins.metric import Metric, ModelMetric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask

DEFAULT_ITEMS = 100
BATCH_SIZE = 8


@hookimpl
def sleb_metrics() -> list[Metric]:
    """Offer this metric."""
    return [TaskError()]


class TaskError(ModelMetric):
    """1 - accuracy on the first items of an lm-eval task, from 0 to 1: `task:piqa`, `task:piqa:500`, `task:my.yaml`.

    The accuracy is `acc_norm` (likelihoods normalized by the answers' lengths) if the task has it, else `acc`. It is
    coarse: with the default of 100 items, it moves in steps of 0.01, and chance explains up to 5 of them. The
    calibration tokens are not used, and the model runs once for each candidate.
    """

    name = "task"
    description = "1 - accuracy on the first items (default: 100) of an lm-eval task, by name or YAML file"
    argument = "TASK[:ITEMS]"
    _task: LoadedTask

    def with_argument(self, argument: str) -> TaskError:
        """Return the metric for this task, after loading its data.

        Raises:
            DataError: the task is unknown, or its file or data cannot be read.
            UsageError: the number of items is invalid.
        """
        named, _, items = argument.rpartition(":")
        if not named:
            named, items = argument, str(DEFAULT_ITEMS)
        if not (items.isascii() and items.isdigit() and int(items)):
            raise UsageError(f"task:{argument} asks for {items!r} items.", hint="Write it like task:piqa:100.")
        metric = TaskError()
        # A file by its path, so that a search that extends the plan finds it again.
        metric.name = f"task:{named}" + ("" if int(items) == DEFAULT_ITEMS else f":{items}")
        metric._task = load_task(named, int(items))
        return metric

    def fingerprint(self) -> str:
        """Return lm-eval's version, and hashes of the task's settings and items."""
        return self._task.fingerprint()

    def score_model(self, model: nn.Module, tokenizer: Any, sequences: Tensor) -> float:
        """Return 1 - accuracy."""
        name = self._task.name
        found = self._task.run(model, tokenizer)["results"].get(name, {})
        for measure in ("acc_norm,none", "acc,none"):
            if measure in found:
                return 1.0 - float(found[measure])
        raise DataError(f"The task {name} measures no accuracy.", hint="Use a multiple-choice task, such as piqa.")


def load_task(named: str, items: int) -> LoadedTask:
    """Load the first items of a task, which is a name or a YAML file.

    Raises:
        DataError: the task is unknown, or its file or data cannot be read.
    """
    from sleb_cli.engine.quality.lm_eval_tasks import load_tasks  # torch, so here

    is_file = named.endswith((".yaml", ".yml"))
    name, folder = (_name_in(Path(named)), Path(named).parent) if is_file else (named, None)
    (task,) = load_tasks([name], EvalRequest(None, include_path=folder, batch_size=BATCH_SIZE, limit=items))
    return task


def _name_in(file: Path) -> str:
    """Read a task's name from its file, whose YAML may contain tags that only lm-eval can load."""
    try:
        found = re.search(r"^task:[ \t]*[\"']?([^\s\"'#]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The task file {file} cannot be read.", hint="Check the path.") from error
    if not found:
        raise DataError(f"The task file {file} names no task.", hint="It needs a line like `task: my_task`.")
    return found[1]
