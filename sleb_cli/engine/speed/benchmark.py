"""`sleb bench`: measured speed, memory and energy, the dense model and the pruned ones in turn on the same machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import choose_device, choose_dtype, free_memory
from sleb_cli.engine.environment import cpu_governor, processor_name
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.speed.peak_memory import Alone, measure_alone
from sleb_cli.engine.speed.runners import EngineRunner, Loaded, Runner, TransformersRunner, WriteFiles, engine_settings
from sleb_cli.engine.speed.timing import Measured, Removals, measure, model_name, workload_result
from sleb_cli.engine.speed.transformers_model import TransformersModel, as_timed
from sleb_cli.engine.speed.work import Work, count_work
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import BenchResult, ModelSize, Workload
from sleb_cli.version import __version__
from sleb_plugins import Engine, UnsupportedModelError


def benchmark(
    subject: Subject,
    request: BenchRequest,
    notify: Notify,
    engine: tuple[Engine, WriteFiles] | None = None,
) -> BenchResult:
    """Time each workload on the dense model and on each size of the pruned one, with transformers or an `engine`.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        MachineError: the engine is not installed or does not run here, or the models cannot be compiled here.
    """
    if engine:
        gguf = ["dtype"] if engine[0].reads == "gguf" else []
        request.refuse(["device", "compile", "static_cache", *gguf], f"does not apply to --engine {engine[0].name}")
    architecture = subject.architecture
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype or AUTO, architecture.dtype, device)
    workloads = resolve_workloads(request, subject, device, notify)
    surgeries = subject.sizes(request)
    with threads(request.threads):
        runner: Runner
        if engine:
            settings = engine_settings(workloads, dtype, models=2 if subject.surgery.removals else 1)
            runner = EngineRunner(*engine, settings, notify)
        else:
            runner = TransformersRunner(dtype, device, notify, in_pairs=architecture.is_quantized)
        sizes, measured = _time(runner, architecture, workloads, surgeries, notify)
        memory = {}
        for removals in () if engine else list(sizes):
            alone = Alone(architecture.source, removals, dtype, device, torch.get_num_threads())
            seconds, memory[removals] = measure_alone(alone, workloads, notify)
            sizes[removals] = sizes[removals].model_copy(update={"load_seconds": seconds})
        # A GGUF file has its own data types, so the bytes of the checkpoint are not those that are read.
        works = {} if engine and engine[0].reads == "gguf" else _works(architecture, workloads, dtype, notify)
        return BenchResult(
            schema_version=1,
            sleb_version=__version__,
            kind="bench",
            model=architecture.record,
            dtype=runner.dtype,
            device=runner.device,
            threads=torch.get_num_threads(),
            processor=processor_name(device),
            governor=cpu_governor(),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            dense=sizes[()],
            pruned=tuple(sizes[surgery.removals] for surgery in surgeries),
            workloads=tuple(
                workload_result(
                    workload,
                    measured[workload],
                    [surgery.removals for surgery in surgeries],
                    memory={removals: found[number] for removals, found in memory.items()},
                    work=works.get(workload),
                    engine_version=runner.version,
                    attention=runner.attention,
                )
                for number, workload in enumerate(workloads)
            ),
        )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads; None keeps its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turn(workload: Workload, models: Mapping[str, Any], notify: Notify) -> dict[str, list[float]]:
    """Return the seconds of each timed run of these transformers models, run in turn."""
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    runs = {name: TransformersModel(model, workload).run for name, model in models.items()}
    with as_timed(models.values(), workload):
        measured = measure(runs, workload, vocabulary, notify)
    return {name: sample.seconds for name, sample in measured.samples.items()}


def _time(
    runner: Runner,
    architecture: Architecture,
    workloads: Sequence[Workload],
    surgeries: Sequence[Surgery],
    notify: Notify,
) -> tuple[dict[Removals, ModelSize], dict[Workload, list[Measured]]]:
    """Time all sizes together or, if only two models fit, each in turn with the dense one."""
    sizes: dict[Removals, ModelSize] = {}
    measured: dict[Workload, list[Measured]] = {workload: [] for workload in workloads}

    def time_together(dense: Loaded, group: Sequence[Surgery]) -> None:
        with ExitStack() as stack:
            models = [dense, *(stack.enter_context(runner.load(surgery)) for surgery in group)]
            sizes.update({model.size.removals: model.size for model in models})
            for workload, found in measured.items():
                runs = {model_name(model.size.removals): model.run(workload) for model in models}
                with runner.timing(workload):
                    vocabulary = architecture.text_config.vocab_size
                    found.append(measure(runs, workload, vocabulary, notify, runner.meter))

    with runner.load(Surgery(architecture, ())) as dense:
        for group in [[surgery] for surgery in surgeries] if runner.in_pairs and surgeries else [surgeries]:
            time_together(dense, group)
            free_memory()
    return sizes, measured


def _works(
    architecture: Architecture, workloads: Sequence[Workload], dtype: torch.dtype, notify: Notify
) -> dict[Workload, Work]:
    """Return the work of each workload on the dense model, where it is known."""
    found = {}
    with task(notify, "Counting operations and bytes"):
        for workload in workloads:
            shape = workload.batch_size, workload.prompt_length, workload.new_tokens
            try:
                found[workload] = count_work(architecture, *shape, dtype)
            except UnsupportedModelError as error:
                notify(Notice(f"{workload.label}: the bound of the speedup is unknown. {error.message}"))
    return found
