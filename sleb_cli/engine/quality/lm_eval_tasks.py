"""Find lm-eval's tasks, load them, and run them on a model in memory, without lm-eval's noise."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest import mock

from torch import Tensor

from sleb_cli.cache import write_cached
from sleb_cli.checks.text_names import task_names_key, unknown_task
from sleb_cli.engine.device import input_device
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality import written_code
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_cli.events import Event, Notify, ignore
from sleb_cli.requests import AUTO, RunCode
from sleb_cli.texts.data_set import loading_data
from sleb_cli.units import plural
from sleb_plugins.errors import DataError, UsageError

# Where lm-eval's own search for the largest batch begins.
MAX_BATCH = 64
# On a CPU that search takes long, and too large a batch may end the process. Writing needs the
# logits of the last position alone, so more fits.
CPU_BATCH, WRITING_BATCH = 8, 32
BOOTSTRAP_ITERATIONS = 1000
FEWSHOT_SEED = 1234


class LoadedTask:
    """A task, group or tag of lm-eval with its data, to be run on any number of models.

    Args:
        manager: lm-eval's index of tasks.
        limit: the number of items to use, from the start; None for all.
        num_fewshot: replaces the task's own number of examples unless that is 0, as in lm-eval.
        chat: whether prompts are in the chat template.
        batch_size: requests in a batch; None to suit the device.
        run_code: how programs that the model writes are run; None if they may not be.

    Raises:
        DataError: its file or data cannot be read, or it needs something that is not supported.
        MachineError: it runs programs, which cannot be confined here.
        UsageError: it has fewer examples, or runs programs, which it may not.
    """

    def __init__(
        self,
        name: str,
        manager: Any,
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        chat: bool = False,
        batch_size: int | None = None,
        run_code: RunCode | None = None,
    ) -> None:
        self.name = name
        self._manager = manager
        self.limit = limit
        self._chat = chat
        self._batch_size = batch_size
        self._run_code = run_code
        loaded = _load(manager, name, run_code)
        self.tasks: Mapping[str, Any] = loaded["tasks"]
        """A group or tag has several."""
        self._groups: Mapping[str, Any] = loaded["groups"]
        for task in self.tasks.values():
            configured = task.get_config("num_fewshot")
            if configured is None or (configured and num_fewshot is not None):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            if num_fewshot and task.get_config("num_fewshot"):
                self._require_examples(task, num_fewshot)

    def _require_examples(self, task: Any, num_fewshot: int) -> None:
        with _quietly_loading(self.name):
            examples = len(list(task.fewshot_docs()))
        split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
        if split is not None and split == task.get_config("test_split"):
            examples -= 1  # an item is no example of itself
        if num_fewshot > examples:
            raise UsageError(
                f"{self.name} has {plural(examples, 'example')}, not {num_fewshot}.",
                hint=f"Use --num-fewshot {examples} or fewer.",
            )

    def fingerprints(self, tokenizer: Any) -> dict[str, str]:
        """Hash all that results depend on besides the model, for each task and group with metrics.

        The requests are built for it, since a task's code may read its prompts from anywhere. The
        tokenizer only writes chats.

        Raises:
            UsageError: as of `run`.
        """
        self._require_tokens(tokenizer)
        hashes = {}
        for name, task in self.tasks.items():
            with _quietly_loading(name):
                requests = self._hash_requests(task, tokenizer)
            code = self._code_beside(name)
            depends = [version("lm_eval"), self._chat, _settings_of(task), code, requests]
            if getattr(task, "UNSAFE_CODE", False):
                depends.append(self._run_code)
            hashes[name] = _hash(depends)
        for name, group in self._groups.items():
            if group.aggregate_metric_list:
                hashes[name] = _hash([hashes, group.aggregate_metric_list])
        return hashes

    def _hash_requests(self, task: Any, tokenizer: Any) -> str:
        from sleb_cli.engine.lm_eval_internals import HFLM, handle_non_serializable

        write_chat = None
        if self._chat:
            lm = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
            write_chat = partial(HFLM.apply_chat_template, lm)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        task.build_all_requests(
            limit=self.limit,
            apply_chat_template=self._chat,
            fewshot_as_multiturn=self._chat,
            chat_template=write_chat,
        )
        hashed = hashlib.sha256()
        for request in task.instances:
            target = task.doc_to_target(request.doc)
            parts = [request.request_type, request.doc, request.args, target]
            text = json.dumps(parts, sort_keys=True, default=handle_non_serializable)
            hashed.update(text.encode())
        return hashed.hexdigest()

    def _code_beside(self, name: str) -> dict[str, str]:
        # The code beside the file of a task, or of the group that defines it, but not where it is.
        code = {}
        for named in (name, self.name):
            entry = self._manager.task_index.get(named)
            if not (entry and entry.yaml_path):
                continue
            folder = entry.yaml_path.parent
            # The version of lm-eval stands for its own code.
            if not folder.is_relative_to(_lm_eval_folder()):
                for file in folder.rglob("*.py"):
                    code[str(file.relative_to(folder))] = file.read_bytes().hex()
        return code

    @property
    def writes(self) -> bool:
        """Whether the model writes any answers; otherwise, it only rates given ones."""
        return any(map(_writes, self.tasks.values()))

    def run(
        self,
        model: Any,
        tokenizer: Any,
        model_name: str,
        notify: Notify,
        group: ProcessGroup,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Any]:
        """Return lm-eval's results on a model with all samples, as JSON holds them.

        `predict` returns the logits of tokens, [batch, positions], in place of a pass of the model.
        If the device is out of memory, smaller batches are tried.

        Raises:
            UsageError: the task needs more positions than the model has, or a chat template or EOS
                token that the tokenizer lacks.
        """
        self._require_tokens(tokenizer)
        device = input_device(model)
        first: int | str = self._batch_size or AUTO
        if first == AUTO and all(map(_writes, self.tasks.values())):
            first = WRITING_BATCH  # lm-eval would try sizes with texts as long as the model takes
        elif first == AUTO and device.type == "cpu":
            first = CPU_BATCH
        largest = first if isinstance(first, int) else MAX_BATCH

        def run(requests: int) -> dict[str, Any]:
            from sleb_cli.engine.quality.lm_eval_model import LmEvalModel

            size = first if requests == largest else requests
            names = (self.name, model_name)
            lm = LmEvalModel(model, tokenizer, size, names, notify, group, predict)
            return self._evaluate(lm)

        notify = partial(_tell, notify, sys.stdout, sys.stderr)
        with _quietly_loading(self.name):
            return in_smaller_pieces(run, largest, device, notify, "continuing with {} requests")

    def _require_tokens(self, tokenizer: Any) -> None:
        if self._chat and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "--apply-chat-template needs a chat template, but the tokenizer has none.",
                hint="Leave it out.",
            )
        for name, task in self.tasks.items():
            if tokenizer.eos_token_id is None and _writes(task):
                raise UsageError(
                    f"{name} has the model write text, but the tokenizer has no EOS token to end "
                    f"it.",
                    hint="Leave the task out, or set eos_token in tokenizer_config.json.",
                )

    def _evaluate(self, lm: Any) -> dict[str, Any]:
        from sleb_cli.engine.lm_eval_internals import (
            handle_non_serializable,
            normalize_gen_kwargs,
            simple_evaluate,
        )

        for name, task in self.tasks.items():
            if not _writes(task):
                continue
            settings = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})
            new = int(settings.get("max_gen_toks", 0))
            if new >= lm.max_length:
                raise UsageError(
                    f"{name} has the model write up to {new} tokens, but it has only "
                    f"{lm.max_length} positions.",
                    hint="Leave the task out.",
                )
        tasks = list(self.tasks.values())
        if self.name in self._groups:
            tasks = [self._groups[self.name]]
        with mock.patch.object(written_code.CodeEval, "how", self._run_code):
            results = simple_evaluate(
                model=lm,
                tasks=tasks,
                task_manager=self._manager,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                apply_chat_template=self._chat,
                fewshot_as_multiturn=self._chat,
                fewshot_random_seed=FEWSHOT_SEED,
                confirm_run_unsafe_code=self._run_code is not None,
            )
        results["chat_template"] = lm.chat_template(True) if self._chat else None
        # The samples hold what tasks made, such as answers that are classes of their own.
        return dict(json.loads(json.dumps(results, default=handle_non_serializable)))


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Index lm-eval's tasks in `folders`, and in its own folders as far as these names need them.

    Raises:
        DataError: a task is unknown.
    """
    from sleb_cli.engine.lm_eval_internals import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    # lm-eval takes ten seconds to index all of its folders, so they are searched as text first.
    if missing := set(names) - set(manager.all_subtasks):
        manager = TaskManager(
            include_path=[*map(str, _folders_with(missing)), *paths], include_defaults=False
        )
    if not set(names) <= set(manager.all_subtasks):  # a group may name tasks of any folder
        manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            if len(folders) == 1:  # all are known from now on
                write_cached(*task_names_key(), manager.all_tasks, "lm-eval's tasks", ignore)
            raise unknown_task(name, manager.all_tasks)
    return manager


def _folders_with(tasks: set[str]) -> list[Path]:
    folders: dict[str, Path] = {}
    named = re.compile(r"^task:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
    for file in sorted((_lm_eval_folder() / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        for name in tasks.intersection(named.findall(text)):
            folders.setdefault(name, file.parent)
    return list(dict.fromkeys(folders.values()))


def _load(manager: Any, name: str, run_code: RunCode | None) -> dict[str, Any]:
    # A task file can run any code, so lm-eval can raise anything.
    failed = error_saying(DataError, f"lm-eval cannot load {name}", "Check the task's file.")
    with translate_errors(failed), _quietly_loading(name), written_code.replace_code_eval():
        loaded: dict[str, Any] = manager.load([name])
    for task_name, loaded_task in loaded["tasks"].items():
        elsewhere = "Run `lm-eval` on the checkpoint that `sleb apply` writes."
        if getattr(loaded_task, "MULTIMODAL", False):
            raise DataError(f"The task {task_name} needs images.", hint=elsewhere)
        if not getattr(loaded_task, "UNSAFE_CODE", False):
            continue
        metrics = loaded_task.get_config("metric_list") or ()
        if not any(written_code.is_run_by(metric["metric"]) for metric in metrics):
            raise DataError(
                f"The task {task_name} runs code that the model writes, without limits.",
                hint=elsewhere,
            )
        if run_code is None:
            raise UsageError(
                f"The task {task_name} runs programs that the model writes.",
                hint="Add --run-code confined to allow it on this machine.",
            )
        written_code.passes("", run_code)
    return loaded


def _settings_of(task: Any) -> dict[str, Any]:
    settings: dict[str, Any] = task.dump_config()
    metadata = dict(settings.get("metadata") or {})
    metadata.pop("config_source", None)  # a task may move
    return settings | {"metadata": metadata}


def _lm_eval_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent


def _writes(task: Any) -> bool:
    return bool(task.OUTPUT_TYPE == "generate_until")


def _hash(data: Iterable[Any]) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    # A function whose source cannot be read is written with its address, which differs from run to
    # run.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:12]


def _tell(notify: Notify, stdout: TextIO, stderr: TextIO, event: Event) -> None:
    """Call the listener with its streams, which `_quietly_loading` takes from it."""
    with redirect_stdout(stdout), redirect_stderr(stderr):
        notify(event)


@contextmanager
def _quietly_loading(name: str) -> Iterator[None]:
    from sleb_cli.engine.lm_eval_internals import evaluator

    # lm-eval prints, runs git and a dozen other programs to describe the machine, starts processes
    # that inherit the model for its bootstrap, and under a launcher returns results in one process
    # of each machine only.
    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        mock.patch.multiple(
            evaluator, get_git_commit_hash=lambda: None, add_env_info=lambda results: None
        ),
        mock.patch.dict(os.environ, DISABLE_MULTIPROC="1", LOCAL_RANK="0"),
        loading_data(f"data of {name}", "Check the network, or the paths in your own task file."),
    ):
        yield
