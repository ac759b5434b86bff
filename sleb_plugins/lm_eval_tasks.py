"""lm-eval on a model in memory: find and load its tasks, run them, and keep its noise off the screen."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from sleb_plugins.errors import DataError, did_you_mean, is_out_of_memory


def load_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """Return lm-eval's task manager after loading these tasks and their data; `folder` holds further task files.

    Raises:
        DataError: there is no such task, or its file or data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks, otherwise="`lm-eval ls tasks` lists them.")
            raise DataError(f"lm-eval has no task {name!r}.", hint=hint)
    tasks = ", ".join(names)
    with _loading_data(tasks):
        try:
            manager.load(list(names))
        except Exception as error:  # a task file can run any code, so lm-eval can raise anything
            if isinstance(error, _data_errors()):
                raise
            reason = _first_line(error) or type(error).__name__
            raise DataError(f"lm-eval cannot load {tasks}: {reason}.", hint="Check the task's file.") from error
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
    """Return lm-eval's results for loaded tasks; with `limit`, only the first items of each task are run.

    This is `lm_eval.simple_evaluate` without its report on the environment, for which it runs git and several other
    programs. Seeds and few-shot rules are the same. If the device is out of memory, smaller batches are tried.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with _loading_data(", ".join(names)):
            _set_seeds()
            loaded = manager.load(list(names))
            for task in loaded["tasks"].values():
                configured = task.get_config("num_fewshot")
                if configured is None or (configured and num_fewshot is not None):
                    task.set_config(key="num_fewshot", value=num_fewshot or 0)
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            results: dict[str, Any] = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                fewshot_as_multiturn=True,
            )
        return results
    except (RuntimeError, MemoryError) as error:
        if batch_size == 1 or not is_out_of_memory(error):
            raise
    # The items of a batch do not depend on each other.
    half = batch_size // 2
    return run_tasks(manager, names, model, tokenizer, batch_size=half, limit=limit, num_fewshot=num_fewshot)


def task_fingerprint(manager: Any, name: str, limit: int) -> str:
    """Return what the results of a loaded task depend on besides the model: lm-eval, its settings and its items."""
    with _loading_data(name):
        tasks = sorted(manager.load([name])["tasks"].items())
        settings = [(task, loaded.dump_config()) for task, loaded in tasks]
        items = [list(islice(loaded.eval_docs, limit)) for _, loaded in tasks]
        examples = [list(loaded.fewshot_docs()) for _, loaded in tasks if loaded.get_config("num_fewshot")]
    shots = ", ".join(sorted({f"{loaded.get_config('num_fewshot') or 0}-shot" for _, loaded in tasks}))
    version = importlib.metadata.version("lm_eval")
    return f"lm-eval {version}, {shots}, settings {_hash(settings)}, items {_hash([items, examples])}"


def _hash(data: Iterable[Any]) -> str:
    text = json.dumps(data, sort_keys=True, default=lambda value: type(value).__qualname__)
    # A function whose source cannot be read is written with its address, which differs from run to run.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:12]


def _set_seeds() -> None:
    """Seed all random number generators as `simple_evaluate` does, for tasks that sample answers."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _data_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetNotFoundError

    return (DatasetNotFoundError, ConnectionError, FileNotFoundError)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _loading_data(names: str) -> Iterator[None]:
    """Hide lm-eval's progress bars, and name the tasks whose data cannot be loaded."""
    try:
        with redirect_stderr(StringIO()):
            yield
    except _data_errors() as error:
        raise DataError(
            f"The data of {names} cannot be loaded: {_first_line(error)}.",
            hint="Check the network, or the paths in your own task file.",
        ) from error
