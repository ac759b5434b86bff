"""lm-eval on a model in memory: its tasks found and loaded, its noise kept off the screen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sleb_plugins.errors import DataError


def load_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """Give lm-eval's task manager, once it has loaded these tasks and their data; `folder` holds further task files.

    Raises:
        DataError: there is no such task, or its file or data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=1)
            raise DataError(
                f"lm-eval knows no task {name!r}.",
                hint=f"Did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them.",
            )
    said = ", ".join(names)
    with _loading_data(said):
        try:
            manager.load(list(names))
        except Exception as error:  # a task file holds anything, and so lm-eval raises anything
            if isinstance(error, _data_errors()):
                raise
            words = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise DataError(f"lm-eval cannot load {said}: {words}.", hint="Check the task's own file.") from error
    return manager


def run_tasks(
    manager: Any,
    names: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Give lm-eval's results for tasks that were loaded; `limit` takes only the first items of each."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    # lm-eval asks git about the folder you stand in, which complains aloud where that is no repository.
    with _loading_data(", ".join(names)), patch.object(evaluator, "get_git_commit_hash", lambda: None, create=True):
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return results


def _data_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetNotFoundError

    return (DatasetNotFoundError, ConnectionError, FileNotFoundError)


@contextmanager
def _loading_data(names: str) -> Iterator[None]:
    """Keep lm-eval's own bars off the screen, and say plainly where a task's data cannot be had."""
    try:
        with redirect_stderr(StringIO()):
            yield
    except _data_errors() as error:
        words = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"The data of {names} cannot be loaded: {words}.",
            hint="Check the network, or the paths in a task file of your own.",
        ) from error
