"""`sleb bench`: measured speed, memory and energy, the dense model and the pruned ones in turn on the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name, free_memory
from sleb_cli.engine.environment import cpu_governor, processor_name
from sleb_cli.engine.model.generation import as_transformers_loads
from sleb_cli.engine.speed.energy import Meter, find_meter
from sleb_cli.engine.speed.in_turn import Measured, measure
from sleb_cli.engine.speed.peak_memory import Alone, AloneResult, measure_alone, weights_bytes
from sleb_cli.engine.speed.timings import DENSE, Compared, Facts, Removals, workload_result
from sleb_cli.engine.speed.transformers_model import TransformersModel, compiled_anew
from sleb_cli.engine.speed.work import Work, count_work
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import BenchResult, ModelSize, Workload, WorkloadResult
from sleb_cli.version import __version__
from sleb_plugins import MachineError, UnsupportedModelError


def benchmark(subject: Subject, request: BenchRequest, notify: Notify) -> BenchResult:
    """Time each workload on the dense model and on each size of the pruned one.

    Raises:
        UsageError: a number is out of range.
        MachineError: the models cannot be compiled here.
    """
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype or AUTO, subject.architecture.dtype, device)
    workloads = resolve_workloads(request, subject, device, notify)
    surgeries = subject.sizes(request)
    with threads(request.threads):
        timed = _Timer(subject, dtype, device, notify).time(workloads, surgeries)
        alone = {
            removals: measure_alone(
                Alone(subject.architecture.source, removals, dtype, device, torch.get_num_threads()), workloads, notify
            )
            for removals in timed.sizes
        }
        sizes = {
            removals: size.model_copy(update={"load_seconds": alone[removals].load_seconds})
            for removals, size in timed.sizes.items()
        }
        return BenchResult(
            schema_version=1,
            sleb_version=__version__,
            kind="bench",
            model=subject.architecture.record,
            dtype=dtype_name(dtype),
            device=device.type,
            threads=torch.get_num_threads(),
            processor=processor_name(device),
            governor=cpu_governor(),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            dense=sizes[()],
            pruned=tuple(sizes[surgery.removals] for surgery in surgeries),
            workloads=_results(workloads, timed, alone, _works(subject, workloads, dtype, notify)),
        )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads; None leaves the number to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turn(workload: Workload, models: Mapping[str, Any], notify: Notify) -> dict[str, list[float]]:
    """Return the seconds of each timed run of these models of transformers, run in turn."""
    measured = _measure(workload, models, notify, None)
    return {name: sample.seconds for name, sample in measured.samples.items()}


def _measure(workload: Workload, models: Mapping[str, Any], notify: Notify, meter: Meter | None) -> Measured:
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    runs = {name: TransformersModel(model, workload).run for name, model in models.items()}
    with as_transformers_loads(models.values()), compiled_anew() if workload.compiled else nullcontext():
        return measure(runs, workload, vocabulary, notify, meter)


@dataclass(frozen=True)
class _Timed:
    """What was timed: the models by their removals, and what they were compared in, workload by workload."""

    sizes: dict[Removals, ModelSize]
    attention: str | None
    compared: dict[Workload, list[Compared]]


@dataclass(frozen=True)
class _Timer:
    """Loads models and times them."""

    subject: Subject
    dtype: torch.dtype
    device: torch.device
    notify: Notify

    def time(self, workloads: Sequence[Workload], surgeries: Sequence[Surgery]) -> _Timed:
        """Time all sizes together where they share the dense model's weights, and else one at a time beside it."""
        architecture = self.subject.architecture
        meter = self._meter()
        dense = load_dense(architecture, self.dtype, self.device, self.notify)
        attention = getattr(dense.config.get_text_config(), "_attn_implementation", None)
        timed = _Timed({(): self._size(dense, None)}, attention, {workload: [] for workload in workloads})
        in_pairs = architecture.is_quantized and len(surgeries) > 1
        for group in [(surgery,) for surgery in surgeries] if in_pairs else [surgeries]:
            names = {f"{len(surgery.removals)} blocks fewer": surgery for surgery in group}
            models = {DENSE: dense} | {name: self._load(surgery, dense) for name, surgery in names.items()}
            timed.sizes.update({names[name].removals: self._size(models[name], names[name]) for name in names})
            removals = {name: surgery.removals for name, surgery in names.items()}
            for workload in workloads:
                measured = _measure(workload, models, self.notify, meter)
                timed.compared[workload].append(Compared(measured, removals))
            models.clear()
            free_memory()
        return timed

    def _load(self, surgery: Surgery, dense: Any) -> Any:
        return load_pruned(surgery, self.dtype, self.device, self.notify, dense=dense)

    def _meter(self) -> Meter | None:
        try:
            return find_meter(self.device)
        except MachineError as error:
            self.notify(Notice(error.message))
            return None

    def _size(self, model: Any, surgery: Surgery | None) -> ModelSize:
        """Count parameters as if none were packed, and the bytes of all that is stored, since packed ones are not."""
        architecture, unpacked = self.subject.architecture, self.subject.architecture.skeleton
        if surgery is not None:
            unpacked = architecture.build(architecture.read_config(surgery.prune_config()))
        return ModelSize(
            removals=surgery.removals if surgery else (),
            blocks=len(architecture.blocks_of(model)),
            parameters=sum(tensor.numel() for tensor in unpacked.parameters()),
            weights_bytes=weights_bytes(model),
            load_seconds=None,
        )


def _works(
    subject: Subject, workloads: Iterable[Workload], dtype: torch.dtype, notify: Notify
) -> dict[Workload, Work | None]:
    """Return the work of each workload on the dense model, or None where it is unknown."""
    found: dict[Workload, Work | None] = {}
    with task(notify, "Counting operations and bytes"):
        for workload in workloads:
            shape = workload.batch_size, workload.prompt_length, workload.new_tokens
            try:
                found[workload] = count_work(subject.architecture, *shape, dtype)
            except UnsupportedModelError as error:
                notify(Notice(f"{workload.label}: no bound of the speedup is known. {error.message}"))
                found[workload] = None
    return found


def _results(
    workloads: Sequence[Workload],
    timed: _Timed,
    alone: Mapping[Removals, AloneResult],
    works: Mapping[Workload, Work | None],
) -> tuple[WorkloadResult, ...]:
    return tuple(
        workload_result(
            workload,
            timed.compared[workload],
            Facts(
                memory={removals: result.memory[number] for removals, result in alone.items()},
                work=works[workload],
                engine_version=transformers.__version__,
                attention=timed.attention,
            ),
        )
        for number, workload in enumerate(workloads)
    )
