"""`sleb bench`: how fast, and how large in memory, are the dense model and the pruned ones on this
machine?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from sleb_cli.results import BenchResult, MemoryRecord, ModelSize, Workload, size_fields
from sleb_plugins import Engine, EngineSettings

_Group = tuple[dict[SizeKey, ModelSize], list[Measured]]
"""The size of each model that was timed together, and the rounds of each workload."""


class _Timings(NamedTuple):
    groups: list[_Group]
    engine_version: str | None
    dtype: str
    device: str
    attention: str | None


@dataclass(frozen=True)
class Benchmark:
    """The job of `sleb bench`: to time each workload on the dense model and on each size of the
    pruned one.

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
        minimum = self.engine.least_new_tokens if self.engine else 0
        lengths = (
            workload.prompt_length + max(minimum, workload.new_tokens)
            for workload in self.workloads
        )
        return EngineSettings(
            dtype=dtype_name(self.placement.dtype),
            threads=torch.get_num_threads(),
            batch_size=max(workload.batch_size for workload in self.workloads),
            sequence_length=max(lengths),
            models=2 if self.sizes else 1,
            trust_remote_code=self.subject.architecture.source.trust_remote_code,
        )


def benchmark(job: Benchmark, notify: Notify, write_files: WriteFiles | None = None) -> BenchResult:
    """Time each workload on the dense model and on each size of the pruned one; an engine reads
    written files.
    """
    with _torch_threads(job.threads):
        timings = _time_models(job, notify, write_files)
        free_memory()  # the processes that measure memory need room
        sizes = {
            removals: size
            for group_sizes, _ in timings.groups
            for removals, size in group_sizes.items()
        }
        memory: dict[SizeKey, list[MemoryRecord | None]] = {}
        for surgery in [] if job.engine else [Surgery(job.subject.architecture), *job.sizes]:
            removals = surgery.size_key
            seconds, memory[removals] = measure_alone(surgery, job.placement, job.workloads, notify)
            sizes[removals] = sizes[removals].model_copy(update={"load_seconds": seconds})
        workloads = (
            workload_result(
                workload,
                [measured[number] for _, measured in timings.groups],
                {removals: by_workload[number] for removals, by_workload in memory.items()},
                engine_version=timings.engine_version,
                attention=timings.attention,
            )
            for number, workload in enumerate(job.workloads)
        )
        return BenchResult(
            **THIS_VERSION,
            kind="bench",
            model=job.subject.architecture.record,
            **size_fields(job.subject.order),
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
    if job.engine and write_files:
        version: str | None = job.engine.version() or None
        load = load_with_engine(job.engine, write_files, job.settings, notify)
    else:
        load = load_with_transformers(job.placement, notify)
        version = transformers.__version__
    # All sizes together or, if only two models fit, each in turn with the dense one.
    architecture = job.subject.architecture
    in_pairs = job.sizes and (
        job.engine or architecture.is_quantized or not job.subject.order.whole_blocks
    )
    groups = []
    with load(Surgery(architecture), None) as dense:
        for group in [[size] for size in job.sizes] if in_pairs else [job.sizes]:
            groups.append(_time_together(job, load, dense, group, notify))
            free_memory()
        return _Timings(groups, version, dense.dtype, dense.device, dense.attention)


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_together(
    job: Benchmark,
    load: ModelLoader,
    dense: TimedModel,
    surgeries: Sequence[Surgery],
    notify: Notify,
) -> _Group:
    vocabulary, measured = job.subject.architecture.text_config.vocab_size, list[Measured]()
    with ExitStack() as stack:
        models = [dense, *(stack.enter_context(load(surgery, dense)) for surgery in surgeries)]
        for workload in job.workloads:
            with ExitStack() as ready:
                runs = {
                    model.size.removals: ready.enter_context(model.prepare(workload)).run
                    for model in models
                }
                measured.append(time_in_turn(runs, workload, vocabulary, notify))
    return {model.size.removals: model.size for model in models}, measured
