"""`sleb bench --estimate`: the size and speed of a model, dense and pruned, predicted from its config."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sleb_cli.engine.device import choose_device, dtype_name, free_bytes, synchronize
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.forward.placement import choose_dtype
from sleb_cli.engine.model.sizes import Sizes, cache_bytes, count_parameters
from sleb_cli.engine.speed.benchmark import threads
from sleb_cli.engine.speed.work import Work, count_work
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import EstimatedSize, EstimatedTiming, EstimatedWorkload, EstimateResult
from sleb_cli.version import __version__
from sleb_plugins import UsageError

ROWS = 10
"""How many sizes are shown, up to half of the blocks, if the user names none."""

DESCRIBED = torch.device("meta")
"""Stands for a device that is described by its figures."""

_TIMING = ("engine", "source", "compile", "static_cache", "iterations", "warmup", "cooldown")


@dataclass(frozen=True)
class Rate:
    """How fast a device computes, and how fast it reads memory."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, read: float) -> float:
        """Return the time of these operations or of reading these bytes, whichever is longer."""
        return max(flops / self.flops_per_second, read / self.bytes_per_second)


@torch.inference_mode()
def measure_rate(dtype: torch.dtype, device: torch.device) -> Rate:
    """Time one product of square matrices and one copy of memory."""
    side, size = (1024, 2**27) if device.type == "cpu" else (8192, 2**30)
    matrix = torch.full((side, side), 0.01, dtype=dtype, device=device)
    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(memory)
    product = _fastest(lambda: matrix @ matrix, device)
    copying = _fastest(lambda: copy.copy_(memory), device)
    return Rate(2 * side**3 / product, 2 * size / copying)  # each byte is read and written


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of five runs, which other programs disturb least, after one to warm up."""

    def once() -> None:
        run()
        synchronize(device)

    return min(timeit.repeat(once, repeat=6, number=1)[1:])


def estimate_speed(subject: Subject, request: BenchRequest, notify: Notify) -> EstimateResult:
    """Predict the speed of each workload and the memory of each size. No weights are read.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        UnsupportedModelError: the size of the KV cache is unknown.
    """
    described = _is_described(request)
    architecture = subject.architecture
    device = DESCRIBED if described else choose_device(request.device)
    counted = count_parameters(architecture)

    def weights(dtype: torch.dtype) -> int:
        return round(counted.without(()) * dtype.itemsize)

    dtype = choose_dtype(architecture, request.dtype or AUTO, device, weights, free_bytes, notify)
    if architecture.is_quantized:
        notify(Notice(f"The weights are quantized; they are counted in {dtype_name(dtype)}."))
    known, removals = bool(subject.surgery.removals), _removals(subject, request)
    shown: Callable[[Sizes], Sizes] = (lambda sizes: sizes) if known else _even
    workloads = resolve_workloads(request, subject, device, notify)
    with threads(request.threads), task(notify, "Predicting the speed", len(workloads)) as advance:
        if request.device_flops and request.device_bandwidth:
            rate = Rate(request.device_flops, request.device_bandwidth)
        else:
            rate = measure_rate(dtype, device)
        predicted: list[tuple[Work, Sizes]] = []
        for workload in workloads:
            shape = workload.batch_size, workload.prompt_length, workload.new_tokens
            work = count_work(architecture, *shape, dtype)
            predicted.append((Work(*map(shown, work)), shown(seconds_of_work(work, rate))))
            advance()
        processor = None if described else processor_name(device)
    parameters, cache = shown(counted), None
    for last in [workload for workload in workloads if workload.new_tokens][-1:]:
        length = last.prompt_length + last.new_tokens
        cache = shown(cache_bytes(architecture, dtype, length=length, batch=last.batch_size))

    def size(removed: tuple[int, ...]) -> EstimatedSize:
        return EstimatedSize(
            removed=len(removed),
            removals=removed if known or not removed else None,
            blocks=architecture.block_count - len(removed),
            parameters=round(parameters.without(removed)),
            weights_bytes=round(parameters.without(removed) * dtype.itemsize),
            kv_cache_bytes=round(cache.without(removed)) if cache else None,
            timings=tuple(
                EstimatedTiming(
                    work=work.record(removed),
                    seconds=seconds.without(removed),
                    speedup=seconds.without(()) / seconds.without(removed),
                    bound=work.bound(removed),
                )
                for work, seconds in predicted
            ),
        )

    return EstimateResult(
        schema_version=1,
        sleb_version=__version__,
        kind="estimate",
        model=architecture.record,
        dtype=dtype_name(dtype),
        device="described" if described else device.type,
        processor=processor,
        flops_per_second=rate.flops_per_second,
        bytes_per_second=rate.bytes_per_second,
        workloads=tuple(
            EstimatedWorkload(**workload.model_dump(include=set(EstimatedWorkload.model_fields)))
            for workload in workloads
        ),
        dense=size(()),
        pruned=tuple(map(size, removals)),
    )


def _is_described(request: BenchRequest) -> bool:
    """Whether the request gives the figures of a device; check that all its options apply."""
    figures = {"--device-flops": request.device_flops, "--device-bandwidth": request.device_bandwidth}
    missing = [option for option, figure in figures.items() if figure is None]
    if len(missing) == 1:
        raise UsageError(
            f"{missing[0]} is missing.", hint="Give both: --device-flops 989e12 --device-bandwidth 3.35e12 (an H100)."
        )
    request.refuse(_TIMING, "does not apply to --estimate")
    if not missing:
        request.refuse(("device", "threads"), "does not apply to --device-flops")
    return not missing


def _removals(subject: Subject, request: BenchRequest) -> list[tuple[int, ...]]:
    """Return the sizes that are asked for: of the plan or of --blocks, or else any blocks, which are average ones."""
    if subject.surgery.removals:
        every = None if request.remove else request.every or 1
        return [surgery.removals for surgery in subject.sizes(replace(request, every=every))]
    blocks = subject.architecture.block_count
    step = request.every or max(1, math.ceil(blocks // 2 / ROWS))
    for count in (*request.remove, *([request.every] if request.every else [])):
        if not 1 <= count < blocks:
            raise UsageError(f"Cannot remove {count} of {blocks} blocks.", hint=f"Name 1 to {blocks - 1}.")
    counts = sorted(set(request.remove)) or range(step, blocks // 2 + 1, step)
    return [tuple(range(count)) for count in counts]


def _even(sizes: Sizes) -> Sizes:
    """Return the same total with all blocks alike."""
    count = len(sizes.blocks)
    return Sizes(sizes.outside, (sum(sizes.blocks) / count,) * count)


def seconds_of_work(work: Work, rate: Rate) -> Sizes:
    """Return the seconds of a batch, by block."""
    prefill, decode = (
        Sizes(rate.seconds(flops.outside, read.outside), tuple(map(rate.seconds, flops.blocks, read.blocks)))
        for flops, read in (work[:2], work[2:])
    )
    return prefill + decode
