"""`sleb bench`: time the dense and the pruned models on this machine, and measure their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from sleb_cli.engine.device import dtype_name, free_memory
from sleb_cli.engine.environment import cpu_governor, processor_name
from sleb_cli.engine.speed.loaders import (
    ModelLoader,
    TimedModel,
    WriteFiles,
    load_with_engine,
    load_with_transformers,
)
from sleb_cli.engine.speed.peak_memory import measure_alone
from sleb_cli.engine.speed.timing import Measured, time_in_turn, workload_result
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify
from sleb_cli.order import SizeKey
from sleb_cli.records import THIS_VERSION
from sleb_cli.results import BenchResult, MemoryRecord, ModelSize, Workload, part_sizes
from sleb_plugins import Engine, EngineSettings


@dataclass(frozen=True)
class Benchmark:
    """The job of `sleb bench`: time each workload on the dense model and on each size.

    An `engine` reads `engine_source`, the model's own file or folder; without one, transformers
    runs the models. `threads` is None for torch's own number. `plugins` has the versions of other
    packages that take part.
    """

    subject: Subject
    sizes: tuple[Surgery, ...]
    workloads: tuple[Workload, ...]
    placement: Placement
    plugins: Mapping[str, str]
    threads: int | None = None
    engine: Engine | None = None
    engine_source: Path | None = None

    @property
    def settings(self) -> EngineSettings:
        """How the engine loads the models."""
        least = self.engine.least_new_tokens if self.engine else 0
        longest = 0
        for workload in self.workloads:
            longest = max(longest, workload.prompt_length + max(least, workload.new_tokens))
        return EngineSettings(
            dtype=dtype_name(self.placement.dtype),
            threads=torch.get_num_threads(),
            batch_size=max(workload.batch_size for workload in self.workloads),
            sequence_length=longest,
            models=2 if self.sizes else 1,
            trust_remote_code=self.subject.architecture.source.trust_remote_code,
        )


@dataclass
class _Timings:
    """How models were timed: the size of each, and for each workload the rounds of each group."""

    engine_version: str | None
    dtype: str
    device: str
    attention: str | None
    sizes: dict[SizeKey, ModelSize]
    measured: list[list[Measured]]


def benchmark(job: Benchmark, notify: Notify, write_files: WriteFiles | None = None) -> BenchResult:
    """Time each workload on the dense model and each size; engines read written files."""
    with ExitStack() as restored:
        restored.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(job.threads or torch.get_num_threads())
        timings = _time_models(job, notify, write_files)
        free_memory()  # the processes that measure memory need room
        sizes = dict(timings.sizes)
        memory: list[dict[SizeKey, MemoryRecord | None]] = [{} for _ in job.workloads]
        if job.engine is None:
            for surgery in [Surgery(job.subject.architecture), *job.sizes]:
                key = surgery.size_key
                seconds, records = measure_alone(surgery, job.placement, job.workloads, notify)
                sizes[key] = sizes[key].model_copy(update={"load_seconds": seconds})
                for of_workload, record in zip(memory, records, strict=True):
                    of_workload[key] = record
        workloads = []
        for number, workload in enumerate(job.workloads):
            result = workload_result(
                workload,
                timings.measured[number],
                memory[number],
                engine_version=timings.engine_version,
                attention=timings.attention,
            )
            workloads.append(result)
        return BenchResult(
            **THIS_VERSION,
            kind="bench",
            model=job.subject.architecture.record,
            parts=part_sizes(job.subject.order),
            dtype=timings.dtype,
            device=timings.device,
            threads=torch.get_num_threads(),
            processor=processor_name(job.placement.device),
            governor=cpu_governor(),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            plugins=dict(job.plugins),
            dense=sizes[()],
            pruned=tuple(sizes[surgery.size_key] for surgery in job.sizes),
            workloads=tuple(workloads),
        )


def _time_models(job: Benchmark, notify: Notify, write_files: WriteFiles | None) -> _Timings:
    architecture = job.subject.architecture
    version: str | None = transformers.__version__
    load: ModelLoader = partial(load_with_transformers, job.placement, notify)
    if job.engine and write_files:
        version = job.engine.version() or None
        load = partial(load_with_engine, job.engine, write_files, job.settings, notify)
    groups = [job.sizes]
    two_fit = job.engine or architecture.is_quantized or not job.subject.order.whole_blocks
    if job.sizes and two_fit:  # only two models: each in turn with the dense one
        groups = [(size,) for size in job.sizes]
    with load(Surgery(architecture), None) as dense:
        timings = _Timings(
            version, dense.dtype, dense.device, dense.attention, {}, [[] for _ in job.workloads]
        )
        for group in groups:
            _time_together(job, load, dense, group, timings, notify)
            free_memory()
    return timings


def _time_together(
    job: Benchmark,
    load: ModelLoader,
    dense: TimedModel,
    surgeries: Sequence[Surgery],
    timings: _Timings,
    notify: Notify,
) -> None:
    """Time the dense model and those after the surgeries in turn."""
    vocabulary = job.subject.architecture.text_config.vocab_size
    with ExitStack() as loaded:
        models = [dense]
        for surgery in surgeries:
            models.append(loaded.enter_context(load(surgery, dense)))
        for model in models:
            timings.sizes[model.size.removals] = model.size
        for workload, measured in zip(job.workloads, timings.measured, strict=True):
            with ExitStack() as ready:
                runs = {}
                for model in models:
                    prepared = ready.enter_context(model.prepare(workload))
                    runs[model.size.removals] = prepared.run
                measured.append(time_in_turn(runs, workload, vocabulary, notify))
