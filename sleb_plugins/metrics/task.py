"""The error on the items of an lm-eval task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb_plugins.errors import DataError, UsageError
from sleb_plugins.lm_eval_tasks import load_tasks, run_tasks, task_fingerprint
from sleb_plugins.metric import ModelMetric

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_ITEMS = 100


class TaskError(ModelMetric):
    """1 - accuracy on the first items of an lm-eval task, from 0 to 1: `task:piqa`, `task:piqa:500`, `task:my.yaml`.

    The accuracy is `acc_norm` (likelihoods normalized by the answers' lengths) if the task has it, else `acc`. It is
    coarse: with 100 items, the default, it moves in steps of 0.01, of which chance explains up to 5. The calibration
    tokens are not used, and the model runs once for each candidate.
    """

    name = "task"
    description = "1 - accuracy on the first items (100) of an lm-eval task, a name or a YAML file"
    argument = "TASK[:ITEMS]"

    def __init__(self, named: str = "", task: str = "", items: int = DEFAULT_ITEMS, manager: Any = None) -> None:
        self._task, self._items, self._manager = task, items, manager
        if named:  # a file by its path, so that a search that extends the plan finds it again
            self.name = f"task:{named}" + ("" if items == DEFAULT_ITEMS else f":{items}")

    def with_argument(self, argument: str) -> TaskError:
        """Return the metric for this task, after loading its data.

        Raises:
            DataError: there is no such task, or its file or data cannot be read.
            UsageError: the number of items is invalid.
        """
        named, _, items = argument.rpartition(":")
        if not named:
            named, items = argument, str(DEFAULT_ITEMS)
        if not (items.isascii() and items.isdigit() and int(items)):
            raise UsageError(f"task:{argument} asks for {items!r} items.", hint="Write it like task:piqa:100.")
        if named.endswith((".yaml", ".yml")):
            name, folder = _name_in(Path(named)), Path(named).parent
            return TaskError(named, name, int(items), load_tasks([name], folder))
        return TaskError(named, named, int(items), load_tasks([named]))

    def fingerprint(self) -> str:
        """Return lm-eval's version, and hashes of the task's settings and items."""
        return task_fingerprint(self._manager, self._task, self._items)

    def score_model(self, model: nn.Module, tokenizer: Any, sequences: Tensor) -> float:
        """Return 1 - accuracy."""
        results = run_tasks(self._manager, [self._task], model, tokenizer, batch_size=8, limit=self._items)
        found = results["results"].get(self._task, {})
        for measure in ("acc_norm,none", "acc,none"):
            if measure in found:
                return 1.0 - float(found[measure])
        raise DataError(
            f"The task {self._task} measures no accuracy.", hint="Use a multiple-choice task, such as piqa."
        )


def _name_in(file: Path) -> str:
    """Read a task's name from its file, whose YAML may contain tags that only lm-eval can load."""
    try:
        found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The task file {file} cannot be read.", hint="Check the path.") from error
    if not found:
        raise DataError(f"The task file {file} names no task.", hint="It needs a line like `task: my_task`.")
    return found[1]
