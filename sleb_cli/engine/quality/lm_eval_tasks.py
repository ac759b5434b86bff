"""lm-eval's tasks: find, load and run them on a model in memory, without lm-eval's noise."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from sleb_cli.canaries import FOLDER
from sleb_cli.engine.device import in_smaller_pieces, input_device
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality import written_code
from sleb_cli.engine.text.sources import loading_data
from sleb_cli.engine.third_party import first_line
from sleb_cli.events import Notice, Notify, ignore
from sleb_cli.requests import AUTO, EvalRequest
from sleb_cli.units import plural
from sleb_plugins.errors import DataError, UsageError, did_you_mean

# Where lm-eval's own search for the largest batch begins.
LARGEST_BATCH = 64
# On a CPU that search takes long, and too large a batch may end the process. Writing needs the logits of the last
# position alone, so more fits.
CPU_BATCH, WRITING_BATCH = 8, 32
BOOTSTRAP_ITERATIONS = 1000

LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
"""These differ from process to process, and change no answer."""


class LoadedTask:
    """A task, group or tag of lm-eval with its data, to be run on any number of models as a request tells.

    `num_fewshot` replaces the task's own number of examples unless that is 0, as in lm-eval.

    Raises:
        DataError: its file or data cannot be read, or it needs something that is not supported.
        UsageError: it has fewer examples.
    """

    def __init__(self, name: str, manager: Any, request: EvalRequest) -> None:
        self.name, self._manager, self._request = name, manager, request
        loaded = _load(manager, name, runs_code=request.may_run_code)
        self.tasks: Mapping[str, Any] = loaded["tasks"]
        """A group or tag has several."""
        self._groups: Mapping[str, Any] = loaded["groups"]
        for each in self.tasks.values():
            configured = each.get_config("num_fewshot")
            if configured is None or (configured and request.num_fewshot is not None):
                each.set_config(key="num_fewshot", value=request.num_fewshot or 0)
            if request.num_fewshot and each.get_config("num_fewshot"):
                with quiet(), _loading_data(name):
                    split = getattr(getattr(each, "fewshot_cfg", None), "split", None)
                    of_items = split is not None and split == each.get_config("test_split")
                    there = len(list(each.fewshot_docs())) - of_items  # an item is no example of itself
                if request.num_fewshot > there:
                    raise UsageError(
                        f"{name} has {plural(there, 'example')}, not {request.num_fewshot}.",
                        hint=f"Use --num-fewshot {there} or fewer.",
                    )

    def fingerprint(self) -> str:
        """Return what the results depend on besides the model and its tokenizer: lm-eval, settings, code and items."""
        tasks = sorted(self.tasks.items())
        with quiet(), _loading_data(self.name):
            settings = [(name, _settings_of(each)) for name, each in tasks]
            items = [list(islice(each.eval_docs, self._request.limit)) for _, each in tasks]
            examples = [list(each.fewshot_docs()) for _, each in tasks if each.get_config("num_fewshot")]
        shots = ", ".join(sorted({f"{each.get_config('num_fewshot')}-shot" for _, each in tasks}))
        version = importlib.metadata.version("lm_eval")
        asked = [self._request.items_per_batch, self._request.apply_chat_template]
        groups = [(name, of.child_names, of.aggregate_metric_list) for name, of in sorted(self._groups.items())]
        more = [what for what in (groups, _environment_of(self.tasks.values())) if what]
        described = _hash([settings, asked, *more])
        return f"lm-eval {version}, {shots}, settings {described}, items {_hash([items, examples])}"

    @property
    def runs_code(self) -> bool:
        """Whether it runs programs that the model writes."""
        return any(map(_runs_code, self.tasks.values()))

    def run(
        self,
        model: Any,
        tokenizer: Any,
        what: str = "",
        notify: Notify = ignore,
        group: ProcessGroup | None = None,
        models: int = 0,
    ) -> dict[str, Any]:
        """Return lm-eval's results on a model, called `what`, with all samples, as JSON holds them.

        If the device is out of memory, smaller batches are tried. With `models`, how many are still to run the task, it
        is told how long that takes.

        Raises:
            UsageError: the task needs more positions than the model has, or a chat template or EOS token that the
                tokenizer lacks.
        """
        if self._request.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "--apply-chat-template needs a chat template, but the tokenizer has none.", hint="Leave it out."
            )
        if tokenizer.eos_token_id is None and (writing := [name for name, each in self.tasks.items() if _writes(each)]):
            raise UsageError(
                f"{writing[0]} has the model write text, but the tokenizer has no EOS token to end it.",
                hint="Leave the task out, or set eos_token in tokenizer_config.json.",
            )
        device, size = input_device(model), self._request.items_per_batch
        if size == AUTO and all(map(_writes, self.tasks.values())):
            size = WRITING_BATCH  # lm-eval would try sizes with texts as long as the model takes
        elif size == AUTO and device.type == "cpu":
            size = CPU_BATCH
        largest = LARGEST_BATCH if isinstance(size, str) else size

        def run(requests: int) -> dict[str, Any]:
            from sleb_cli.engine.quality.lm_eval_model import LoadedModel

            batch_size, named = size if requests == largest else requests, (self.name, what)
            answering = LoadedModel(model, tokenizer, batch_size, named, notify, group or ProcessGroup(), models)
            return self._evaluate(answering)

        def reduced(requests: int) -> None:
            notify(Notice(f"Out of memory on {device}; continuing with {requests} requests at a time."))

        with quiet(), _loading_data(self.name):
            return in_smaller_pieces(run, largest, reduced)

    def _evaluate(self, lm: Any) -> dict[str, Any]:
        import transformers
        from lm_eval.evaluator import simple_evaluate

        for name, each in self.tasks.items():
            if (new := _new_tokens(each)) >= lm.max_length:
                raise UsageError(
                    f"{name} has the model write up to {new} tokens, but it has only {lm.max_length} positions.",
                    hint="Leave the task out.",
                )
        begun, request = time.monotonic(), self._request
        results = simple_evaluate(
            model=lm,
            tasks=[self._groups[self.name]] if self.name in self._groups else list(self.tasks.values()),
            task_manager=self._manager,
            device=str(lm.device),
            batch_size=request.items_per_batch,
            limit=request.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=request.apply_chat_template,
            fewshot_as_multiturn=request.apply_chat_template,
            confirm_run_unsafe_code=request.may_run_code,
        )
        results["config"]["model"] = "sleb"  # not the user's folder
        results["chat_template"] = lm.chat_template(True) if request.apply_chat_template else None
        results["transformers_version"] = transformers.__version__
        results["lm_eval_version"] = importlib.metadata.version("lm_eval")
        results["total_evaluation_time_seconds"] = str(time.monotonic() - begun)
        return as_json(results)


def load_tasks(names: Sequence[str], request: EvalRequest, also: Iterable[str] = ()) -> tuple[LoadedTask, ...]:
    """Load tasks, groups and tags of lm-eval, ours, and those in the request's folder, with their data.

    If a name is unknown, one of `also` may be suggested.

    Raises:
        DataError: a task is unknown, its file or data cannot be read, or it needs something that is not supported.
    """
    manager = find_tasks(names, request, also)
    return tuple(LoadedTask(name, manager, request) for name in names)


def find_tasks(names: Sequence[str], request: EvalRequest, also: Iterable[str] = ()) -> Any:
    """Return lm-eval's index of these tasks, groups and tags, whose data is not read yet; raises like `load_tasks`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(names, [folder for folder in (FOLDER, request.include_path) if folder is not None])
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, [*also, *manager.all_tasks], otherwise="`lm-eval ls tasks` lists them.")
            raise DataError(f"lm-eval has no task {name!r}.", hint=hint)
    return manager


def task_manager(names: Iterable[str], folders: Sequence[Path]) -> Any:
    """Return lm-eval's index of the tasks in `folders` and in those of its own folders that these names need.

    lm-eval takes ten seconds to index all of its folders, so they are searched as text first.
    """
    from lm_eval.tasks import TaskManager

    own = [str(folder) for folder in folders]
    wanted = set(names)
    few = TaskManager(include_path=own, include_defaults=False)
    if missing := wanted - set(few.all_subtasks):
        few = TaskManager(include_path=[*map(str, _folders_with(missing)), *own], include_defaults=False)
    # A group may name tasks of any folder.
    return few if wanted <= set(few.all_subtasks) else TaskManager(include_path=own)


def _folders_with(tasks: Collection[str]) -> list[Path]:
    folders: dict[str, Path] = {}
    for file in sorted((_lm_eval_folder() / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        for found in re.finditer(r"^task:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE):
            if found[1] in tasks:
                folders.setdefault(found[1], file.parent)
    return list(dict.fromkeys(folders.values()))


def _load(manager: Any, name: str, *, runs_code: bool) -> dict[str, Any]:
    try:
        with quiet(), _loading_data(name), written_code.ours():
            loaded: dict[str, Any] = manager.load([name])
    except DataError:
        raise
    except Exception as error:  # a task file can run any code, so lm-eval can raise anything
        raise DataError(f"lm-eval cannot load {name}: {first_line(error)}.", hint="Check the task's file.") from error
    for part, loaded_task in loaded["tasks"].items():
        elsewhere = "Run `lm-eval` on the checkpoint that `sleb apply` writes."
        if getattr(loaded_task, "MULTIMODAL", False):
            raise DataError(f"The task {part} needs images.", hint=elsewhere)
        if not _runs_code(loaded_task):
            continue
        if not any(written_code.is_run_by(of["metric"]) for of in loaded_task.get_config("metric_list") or ()):
            raise DataError(f"The task {part} runs code that the model writes, without limits.", hint=elsewhere)
        if not runs_code:
            raise UsageError(
                f"The task {part} runs programs that the model writes.",
                hint="Add --run-code to allow it on this machine.",
            )
    return loaded


def _runs_code(task: Any) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def _settings_of(task: Any) -> Any:
    """Return a task's settings and the code beside its file, wherever they are."""
    settings, code = task.dump_config(), {}
    if (folder := _folder_of(task)) and not folder.is_relative_to(_lm_eval_folder()):  # its version stands for its code
        code = {str(file.relative_to(folder)): file.read_bytes().hex() for file in sorted(folder.rglob("*.py"))}
    metadata = {key: value for key, value in (settings.get("metadata") or {}).items() if key != "config_source"}
    return settings | {"metadata": metadata}, code


def _folder_of(task: Any) -> Path | None:
    source = Path((task.dump_config().get("metadata") or {}).get("config_source", ""))
    return source.parent if source.is_file() else None


def _environment_of(tasks: Iterable[Any]) -> dict[str, str]:
    """Return the environment variables that are set and that the code beside the tasks' files reads."""
    files = {file for folder in set(map(_folder_of, tasks)) if folder for file in folder.rglob("*.py")}
    code = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    names = set(re.findall(r"(?:environ(?:\.\w+\(|\[)|getenv\()\s*[\"'](\w+)", code)) - LAUNCHER_VARIABLES
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _lm_eval_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent


def _writes(task: Any) -> bool:
    """Whether the model writes its answers; otherwise, it only rates given ones."""
    return bool(task.OUTPUT_TYPE == "generate_until")


def _new_tokens(task: Any) -> int:
    """Return how many tokens the model writes at most for an item."""
    if not _writes(task):
        return 0
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"])


def as_json(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of results as lm-eval's files hold them."""
    from lm_eval.utils import handle_non_serializable

    copy: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return copy


def _hash(data: Iterable[Any]) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    # A function whose source cannot be read is written with its address, which differs from run to run.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:12]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what lm-eval prints, and suppress three things that disturb here.

    lm-eval runs git and a dozen other programs to describe the machine, starts processes that inherit the model for its
    bootstrap, and under a launcher returns results in one process of each machine only.
    """
    from lm_eval import evaluator

    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        mock.patch.multiple(evaluator, get_git_commit_hash=lambda: None, add_env_info=lambda results: None),
        mock.patch.dict(os.environ, DISABLE_MULTIPROC="1", LOCAL_RANK="0"),
    ):
        yield


def _loading_data(name: str) -> AbstractContextManager[None]:
    return loading_data(f"data of {name}", "Check the network, or the paths in your own task file.")
