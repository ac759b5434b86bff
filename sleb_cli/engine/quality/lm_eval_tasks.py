"""lm-eval on a model in memory: find and load its tasks, run them, and keep its noise off the screen."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from sleb_cli.engine.hub import offline_if_unreachable
from sleb_plugins.errors import DataError, OutputError, UsageError, did_you_mean, is_out_of_memory

# Where lm-eval's own search for the largest batch begins.
LARGEST_BATCH = 64
# On a CPU the search for the largest batch takes long, and too large a one may end the process. Writing needs the
# logits of the last position alone, so more fits.
CPU_BATCH, CPU_WRITING_BATCH = 8, 32
BOOTSTRAP_ITERATIONS = 1000

LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
"""What differs from process to process, and changes no answer."""

Observe = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Is told how many requests follow, and yields the function that is told how many of them are done."""

Share = Callable[[Sequence[Sequence[int]], Callable[[Sequence[int]], Sequence[Any]]], list[Any]]
"""Takes batches of requests, by their positions, and a function that answers those at some positions; returns the
answers to all, in their order, of whichever process gave them."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run: on their first items only with `limit`, and `batch_size` requests at once, a number or "auto".

    `num_fewshot` replaces the task's own number of examples unless that is 0, which is lm-eval's rule.
    """

    batch_size: int | str = 1
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


class LoadedTask:
    """A task, group or tag of lm-eval with its data, to be run on any number of models."""

    def __init__(self, name: str, loaded: Mapping[str, Any], settings: TaskSettings) -> None:
        self.name = name
        self._loaded, self._settings = loaded, settings
        for task in self.tasks.values():
            configured = task.get_config("num_fewshot")
            if configured is None or (configured and settings.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)

    @property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's tasks by their names; a group or tag has several."""
        return dict(self._loaded["tasks"])

    def fingerprint(self) -> str:
        """Return what the results depend on besides the model and its tokenizer: lm-eval, settings, code and items."""
        tasks = sorted(self.tasks.items())
        with _quiet(), _loading_data(self.name):
            settings = [(name, _settings_of(task)) for name, task in tasks]
            items = [list(islice(task.eval_docs, self._settings.limit)) for _, task in tasks]
            examples = [list(task.fewshot_docs()) for _, task in tasks if task.get_config("num_fewshot")]
        shots = ", ".join(sorted({f"{task.get_config('num_fewshot')}-shot" for _, task in tasks}))
        version = importlib.metadata.version("lm_eval")
        asked = [self._settings.batch_size, self._settings.apply_chat_template]
        groups = [
            (name, group.child_names, group.aggregate_metric_list)
            for name, group in sorted(self._loaded.get("groups", {}).items())
        ]
        more = [what for what in (groups, _environment_of(self.tasks.values())) if what]
        described = _hash([settings, asked, *more])
        return f"lm-eval {version}, {shots}, settings {described}, items {_hash([items, examples])}"

    def longest_request(self, tokenizer: Any) -> int:
        """Return the tokens of the longest prompt and what is generated after it; 0 if nothing is generated."""
        return max((_longest_request(task, tokenizer, self._settings) for task in self.tasks.values()), default=0)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        observe: Observe | None = None,
        share: Share | None = None,
        *,
        device: Any = None,
    ) -> dict[str, Any]:
        """Return lm-eval's results in its `result_schema`, with all samples, as JSON holds them.

        This is `lm_eval.simple_evaluate` without its report on the environment, for which it runs git and several other
        programs. Seeds and few-shot rules are the same. If the device is out of memory, smaller batches are tried.
        `device` is where tokens go in, which of a model spread over devices is not that of its first weight.

        Raises:
            UsageError: the task does not fit the model's positions, or the tokenizer lacks a chat template or EOS token
                that it needs.
        """
        if self._settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "--apply-chat-template does not work: the tokenizer has no chat template.", hint="Leave it out."
            )
        if tokenizer.eos_token_id is None and (writing := [name for name, t in self.tasks.items() if _new_tokens(t)]):
            raise UsageError(
                f"{writing[0]} has models write text, and this one's tokenizer has no EOS token that would end it.",
                hint="Leave the task out, or name the token as eos_token in tokenizer_config.json.",
            )
        batch_size = self._settings.batch_size
        device = device or model.device
        if batch_size == "auto" and device.type == "cpu":
            batch_size = CPU_WRITING_BATCH if all(map(_new_tokens, self.tasks.values())) else CPU_BATCH
        while True:
            try:
                return self._run(model, tokenizer, batch_size, device, observe, share)
            except (RuntimeError, MemoryError) as error:
                if batch_size == 1 or not is_out_of_memory(error):
                    raise
            # The items of a batch do not depend on each other.
            batch_size = (LARGEST_BATCH if isinstance(batch_size, str) else batch_size) // 2

    def _run(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str,
        device: Any,
        observe: Observe | None,
        share: Share | None,
    ) -> dict[str, Any]:
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        begun = time.monotonic()
        with _quiet(), _loading_data(self.name):
            _set_seeds()
            for task in self.tasks.values():
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            lm._device = device
            self._require_positions(lm.max_length)
            if observe is not None:
                _observe_requests(lm, observe)
            if share is not None:
                _share_requests(lm, share)
            results = evaluate(
                lm=lm,
                task_dict=self._loaded,
                limit=self._settings.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=True,
                apply_chat_template=self._settings.apply_chat_template,
                fewshot_as_multiturn=self._settings.apply_chat_template,
            )
            results |= _metadata(lm, self._settings, time.monotonic() - begun)
        return _as_json(results)

    def _require_positions(self, positions: int) -> None:
        for name, task in self.tasks.items():
            if (new := _new_tokens(task)) >= positions:
                raise UsageError(
                    f"{name} has models write up to {new} tokens, and this one has {positions} positions.",
                    hint="Leave the task out.",
                )


def load_tasks(
    names: Sequence[str],
    folders: Sequence[Path] = (),
    settings: TaskSettings | None = None,
    also: Iterable[str] = (),
) -> tuple[LoadedTask, ...]:
    """Load tasks, groups and tags of lm-eval, and their data; `folders` hold further task files.

    A name that is not there may be meant for one of `also`, which the caller knows.

    Raises:
        DataError: there is no such task, its file or data cannot be read, or it needs what is not done here.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(names, folders)
    for name in names:
        require_task(name, [*also, *manager.all_tasks])
    return tuple(LoadedTask(name, _load(manager, name), settings or TaskSettings()) for name in names)


def task_manager(names: Iterable[str], folders: Sequence[Path]) -> Any:
    """Return lm-eval's index of tasks: of `folders` and those of lm-eval with these tasks, or of all of its folders.

    To read them all takes lm-eval ten seconds, so they are searched as text first.
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
    """Return the folders of lm-eval with files of these tasks."""
    folders: dict[str, Path] = {}
    for file in sorted((_lm_eval_folder() / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        for found in re.finditer(r"^task:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE):
            if found[1] in tasks:
                folders.setdefault(found[1], file.parent)
    return list(dict.fromkeys(folders.values()))


def require_task(name: str, known: Sequence[str]) -> None:
    """Check that there is such a task.

    Raises:
        DataError: there is none; the hint names one that is close.
    """
    if name not in known:
        hint = did_you_mean(name, known, otherwise="`lm-eval ls tasks` lists them.")
        raise DataError(f"lm-eval has no task {name!r}.", hint=hint)


def write_lm_eval_results(folder: Path, results: Mapping[str, Any], model_args: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write results as lm-eval's own command does, `results_DATE.json` and `samples_TASK_DATE.jsonl`; return the files.

    `model_args` are those of lm-eval's `--model sleb`, for the record.

    Raises:
        OutputError: the files cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    # lm-eval changes what it is given.
    results = _as_json(results)
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
    general.start_time -= float(results.get("total_evaluation_time_seconds", 0))
    with _quiet():
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, of_task in samples.items():
            tracker.save_results_samples(task_name=name, samples=of_task)
    # lm-eval tells its log, and nobody else, that it could not write.
    date = getattr(tracker, "date_id", None)
    lines: dict[Path, int | None] = {folder / f"results_{date}.json": None}
    lines |= {folder / f"samples_{name}_{date}.jsonl": len(of_task) for name, of_task in samples.items()}
    if broken := [file for file, count in lines.items() if not _is_whole(file, count)]:
        for file in lines:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise OutputError(f"{broken[0]} cannot be written.", hint="Check the folder's permissions and free space.")
    return tuple(lines)


def _is_whole(file: Path, lines: int | None) -> bool:
    """Whether a file is there to its end: so many lines of JSON, or a JSON document."""
    try:
        text = file.read_text(encoding="utf-8")
        documents = [text] if lines is None else text.split("\n")[:-1]
        for document in documents:
            json.loads(document)
    except (OSError, ValueError):
        return False
    return lines is None or len(documents) == lines


def merge_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return results of several runs on one model as those of one run."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and key != "config":
                merged[key] = merged.get(key, {}) | value
            else:
                merged.setdefault(key, value)
    seconds = sum(float(part["total_evaluation_time_seconds"]) for part in parts)
    return merged | {"total_evaluation_time_seconds": str(seconds)}


def _load(manager: Any, name: str) -> dict[str, Any]:
    with _quiet(), _loading_data(name):
        try:
            loaded: dict[str, Any] = manager.load([name])
        except Exception as error:  # a task file can run any code, so lm-eval can raise anything
            if isinstance(error, _data_errors()):
                raise
            reason = _first_line(error) or type(error).__name__
            raise DataError(f"lm-eval cannot load {name}: {reason}.", hint="Check the task's file.") from error
    for part, task in loaded["tasks"].items():
        for attribute, need in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is no text alone")):
            if getattr(task, attribute, False):
                raise DataError(
                    f"The task {part} {need}.", hint="Run lm-eval's own command on what `sleb apply` writes."
                )
    return loaded


def _settings_of(task: Any) -> Any:
    """Return a task's settings and the code beside its file, whatever folder they lie in."""
    settings = task.dump_config()
    metadata = dict(settings.get("metadata") or {})
    source = Path(metadata.pop("config_source", ""))
    code = {}
    if source.is_file() and not source.is_relative_to(_lm_eval_folder()):  # its version stands for lm-eval's own code
        folder = source.parent
        code = {str(file.relative_to(folder)): file.read_bytes().hex() for file in sorted(folder.rglob("*.py"))}
    return settings | {"metadata": metadata}, code


def _environment_of(tasks: Iterable[Any]) -> dict[str, str]:
    """Return the environment variables that are set and that the code beside the tasks' files reads."""
    sources = {Path((task.dump_config().get("metadata") or {}).get("config_source", "")) for task in tasks}
    files = {file for source in sources if source.is_file() for file in source.parent.rglob("*.py")}
    code = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    names = set(re.findall(r"(?:environ(?:\.\w+\(|\[)|getenv\()\s*[\"'](\w+)", code)) - LAUNCHER_VARIABLES
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _lm_eval_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent


def _longest_request(task: Any, tokenizer: Any, settings: TaskSettings) -> int:
    new = _new_tokens(task)
    if not new:
        return 0
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    with _quiet():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        task.build_all_requests(limit=settings.limit)
    return new + max(len(tokenizer(request.args[0]).input_ids) for request in task.instances)


def _new_tokens(task: Any) -> int:
    """Return how many tokens a model writes at most for an item; 0 if it only rates what is there."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"])


def _observe_requests(lm: Any, observe: Observe) -> None:
    """Have each of lm-eval's calls of the model report its progress."""

    class Hook:
        def __init__(self, advance: Callable[[int], None]) -> None:
            self._advance = advance

        def add_partial(self, kind: str, request: Any, result: Any) -> None:
            self._advance(1)

    def observed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(requests: Sequence[Any], **options: Any) -> Any:
            with observe(len(requests)) as advance:
                lm.set_cache_hook(Hook(advance))
                return call(requests, **options)

        return run

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, observed(getattr(lm, kind)))


def _share_requests(lm: Any, share: Share) -> None:
    """Have several processes answer lm-eval's requests, in the batches that it would make in one."""

    def shared(
        call: Callable[..., Any], batches_of: Callable[[Any, Sequence[Any], Mapping[str, Any]], list[list[int]]]
    ) -> Callable[..., Any]:
        def run(requests: Sequence[Any], **options: Any) -> Any:
            def answer(positions: Sequence[int]) -> Sequence[Any]:
                found = call([requests[n] for n in positions], **options) if positions else []
                for _ in range(len(requests) - len(positions)):  # progress: the others are about as far
                    lm.cache_hook.add_partial("", None, None)
                return found

            return share(batches_of(lm, requests, options), answer)

        return run

    lm._loglikelihood_tokens = shared(lm._loglikelihood_tokens, _batches_of_tokens)
    lm.generate_until = shared(lm.generate_until, _batches_of_prompts)


def _batches_of_tokens(lm: Any, requests: Sequence[Any], options: Mapping[str, Any]) -> list[list[int]]:
    """Return the batches of `HFLM._loglikelihood_tokens`: the longest first, equal prompts of one more token as one."""
    groups: dict[Any, list[int]] = {}
    for position, (_, context, continuation) in enumerate(requests):
        groups.setdefault(tuple(context + continuation[:-1]) if lm.logits_cache else position, []).append(position)

    def order(positions: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        longest = max(positions, key=lambda n: len(requests[n][2]))
        tokens = tuple(requests[longest][1] + requests[longest][2])
        return -len(tokens), tokens

    return _chunks(sorted(groups.values(), key=order), options.get("override_bs") or lm.batch_size)


def _batches_of_prompts(lm: Any, requests: Sequence[Any], options: Mapping[str, Any]) -> list[list[int]]:
    """Return the batches of `HFLM.generate_until`: prompts with the same settings, the longest first.

    Where tokens are sampled, there is one batch, since each depends on those before it.
    """
    groups: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(position)
    if any(request.args[1].get("do_sample") for request in requests):
        return [list(range(len(requests)))]

    def order(position: int) -> tuple[int, str]:
        prompt = requests[position].args[0]
        return -len(lm.tok_encode(prompt)), prompt

    ordered = [[[position] for position in sorted(positions, key=order)] for positions in groups.values()]
    return [batch for positions in ordered for batch in _chunks(positions, lm.batch_size)]


def _chunks(groups: Sequence[Sequence[int]], size: int | str) -> list[list[int]]:
    """Join so many groups to a batch; where lm-eval looks for a size by itself, as many as it begins with."""
    size = LARGEST_BATCH if isinstance(size, str) else int(size)
    return [
        [position for group in groups[first : first + size] for position in group]
        for first in range(0, len(groups), size)
    ]


def _metadata(lm: Any, settings: TaskSettings, seconds: float) -> dict[str, Any]:
    """Return what `simple_evaluate` adds to the results of `evaluate`, where it runs no program for it."""
    import transformers
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.loggers.utils import add_tokenizer_info

    added: dict[str, Any] = {
        "config": {
            "model": "sleb",
            "model_args": None,
            "model_num_parameters": lm.model.num_parameters(),
            "model_dtype": lm.model.dtype,
            "batch_size": settings.batch_size,
            "batch_sizes": list(lm.batch_sizes.values()),
            "device": str(lm.device),
            "use_cache": None,
            "limit": settings.limit,
            "bootstrap_iters": BOOTSTRAP_ITERATIONS,
            "gen_kwargs": None,
            "random_seed": DEFAULT_RANDOM_SEED,
            "numpy_seed": DEFAULT_OTHER_SEED,
            "torch_seed": DEFAULT_OTHER_SEED,
            "fewshot_seed": DEFAULT_OTHER_SEED,
        },
        "date": time.time() - seconds,
        "transformers_version": transformers.__version__,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "chat_template": lm.chat_template(True) if settings.apply_chat_template else None,
        "total_evaluation_time_seconds": str(seconds),
    }
    add_tokenizer_info(added, lm)
    return added


def _as_json(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of results as it is read back from lm-eval's files."""
    from lm_eval.utils import handle_non_serializable

    copy: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return copy


def _hash(data: Iterable[Any]) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
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
def _quiet() -> Iterator[None]:
    """Hide what lm-eval prints, and keep it from starting processes that inherit the model, for its bootstrap."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with ExitStack() as redirected:
            redirected.enter_context(redirect_stdout(StringIO()))
            redirected.enter_context(redirect_stderr(StringIO()))
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _loading_data(names: str) -> Iterator[None]:
    """Name the tasks whose data cannot be loaded."""
    try:
        with offline_if_unreachable() as unreachable:
            yield
    except _data_errors() as error:
        is_offline = unreachable and isinstance(error, ConnectionError)
        reason = f"not in the cache, and {unreachable}" if is_offline else _first_line(error)
        raise DataError(
            f"The data of {names} cannot be loaded: {reason}.",
            hint="Check the network, or the paths in your own task file.",
        ) from error
