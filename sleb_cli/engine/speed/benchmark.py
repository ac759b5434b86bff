"""`sleb bench`: measured speed and memory, dense and pruned in alternation on the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name, free_memory, synchronize
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.speed.peak_memory import peak_memory_alone
from sleb_cli.engine.speed.workloads import choose_workloads, resolve_workload, runner
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify, task
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import BenchResult, ModelSize, Timing, Workload, WorkloadResult
from sleb_cli.version import __version__


def benchmark(subject: Subject, request: BenchRequest, notify: Notify) -> BenchResult:
    """Time each workload on the dense model and, if blocks are removed, on the pruned one.

    Raises:
        UsageError: a number is out of range.
    """
    architecture = subject.architecture
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype or AUTO, architecture.config.dtype, device)
    workloads = [resolve_workload(name, request, subject, device, notify) for name in choose_workloads(request)]
    models = {"dense": load_dense(architecture, dtype, device, notify)}
    if subject.surgery.removals:
        models["pruned"] = load_pruned(subject.surgery, dtype, device, notify, dense=models["dense"])
    sizes = {name: _size(model, subject, _removals(name, subject)) for name, model in models.items()}
    seconds = [time_in_turn(workload, models, notify) for workload in workloads]
    models.clear()
    free_memory()
    results = tuple(
        _result(workload, subject, times, dtype, device, notify)
        for workload, times in zip(workloads, seconds, strict=True)
    )
    return BenchResult(
        schema_version=1,
        sleb_version=__version__,
        kind="bench",
        model=architecture.record,
        removals=subject.surgery.removals,
        dtype=dtype_name(dtype),
        device=device.type,
        threads=torch.get_num_threads(),
        processor=processor_name(device),
        torch=str(torch.__version__),
        dense=sizes["dense"],
        pruned=sizes.get("pruned"),
        workloads=results,
    )


@torch.inference_mode()
def time_in_turn(workload: Workload, models: dict[str, Any], notify: Notify) -> dict[str, list[float]]:
    """Time the models in alternation, so that a machine that slows down affects all of them."""
    rounds = workload.warmup + workload.iterations
    with task(notify, f"Timing {workload.name}", rounds * len(models), "runs") as advance:
        runs = {name: runner(workload, model) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds):
            for name, run in runs.items():
                taken = _time(run, models[name].device)
                if turn >= workload.warmup:
                    seconds[name].append(taken)
                advance(note=f"{name}: {taken:.3f} s")
    return seconds


def _time(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _size(model: Any, subject: Subject, removals: tuple[int, ...]) -> ModelSize:
    """Count parameters as if none were packed, and the bytes of all that is stored, since packed ones are buffers."""
    architecture = subject.architecture
    unpacked = architecture.skeleton
    if removals:
        unpacked = architecture.build(architecture.read_config(subject.surgery.prune_config()))
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return ModelSize(
        blocks=len(architecture.blocks_of(model)),
        parameters=sum(tensor.numel() for tensor in unpacked.parameters()),
        weights_bytes=sum(tensor.nbytes for tensor in stored.values()),
    )


def _removals(name: str, subject: Subject) -> tuple[int, ...]:
    """Return the removals from the model of this name."""
    return subject.surgery.removals if name == "pruned" else ()


def _result(
    workload: Workload,
    subject: Subject,
    seconds: dict[str, list[float]],
    dtype: torch.dtype,
    device: torch.device,
    notify: Notify,
) -> WorkloadResult:
    timings = {}
    for name, times in seconds.items():
        removals = _removals(name, subject)
        peak = peak_memory_alone(subject.architecture.source, removals, workload, dtype, device, notify)
        median = statistics.median(times)
        tokens = workload.batch_size * (workload.new_tokens or workload.prompt_length)
        timings[name] = Timing(
            seconds=tuple(times),
            median_seconds=median,
            tokens_per_second=tokens / median,
            peak_memory_bytes=peak,
        )
    pruned = timings.get("pruned")
    speedup = timings["dense"].median_seconds / pruned.median_seconds if pruned else None
    return WorkloadResult(workload=workload, dense=timings["dense"], pruned=pruned, speedup=speedup)
