"""`sleb bench --estimate`: the size and speed of a model, dense and pruned, predicted from its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name
from sleb_cli.engine.environment import processor_name
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import Sizes, cache_bytes, count_parameters
from sleb_cli.engine.speed.benchmark import threads
from sleb_cli.engine.speed.rates import Rate, Rates, measure_overhead, measure_rate
from sleb_cli.engine.speed.work import Cost, Work, count_work
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify, task
from sleb_cli.requests import AUTO, TRANSFORMERS, BenchRequest
from sleb_cli.results import (
    EstimatedSize,
    EstimatedTiming,
    EstimatedWorkload,
    EstimateResult,
    RateRecord,
    Workload,
    WorkRecord,
)
from sleb_cli.version import __version__
from sleb_plugins import UsageError

ROWS = 10
"""How many sizes are shown, up to half of the blocks, if the user names none."""

DESCRIBED = torch.device("meta")
"""Stands for a device that is described by its figures."""


@dataclass(frozen=True)
class _Removal:
    """The removal of `count` blocks: these, or average ones."""

    count: int
    blocks: tuple[int, ...] | None

    def of(self, sizes: Sizes) -> float:
        """Return the quantity in the model after the removal."""
        if self.blocks is not None:
            return sizes.without(self.blocks)
        return sizes.outside + sum(sizes.blocks) * (1 - self.count / len(sizes.blocks))


_NOTHING = _Removal(0, ())


@dataclass(frozen=True)
class _Predicted:
    """A workload: its work, the rates of its phases, and the seconds of each part of the model."""

    workload: Workload
    work: Work
    prefill: Rates
    decode: Rates | None
    seconds: Sizes


def estimate_speed(subject: Subject, request: BenchRequest, notify: Notify) -> EstimateResult:
    """Predict the speed of each workload and the memory of each size. No weights are read.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        UnsupportedModelError: the size of the KV cache is unknown.
    """
    _require_applicable(request)
    architecture = subject.architecture
    described = request.device_flops is not None
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype or AUTO, architecture.dtype, DESCRIBED if described else device)
    if architecture.is_quantized:
        notify(Notice(f"The weights are quantized; they are counted in {dtype_name(dtype)}."))
    removals = _removals(subject, request)
    workloads = resolve_workloads(request, subject, DESCRIBED if described else device, notify)
    with threads(request.threads), task(notify, "Predicting the speed", len(workloads)) as advance:
        predicted = []
        for workload in workloads:
            predicted.append(_predict(architecture, workload, dtype, None if described else device, request))
            advance()
    cache = _cache(architecture, workloads, dtype)
    dense, *pruned = (_size(architecture, removal, predicted, cache, dtype) for removal in (_NOTHING, *removals))
    return EstimateResult(
        schema_version=1,
        sleb_version=__version__,
        kind="estimate",
        model=architecture.record,
        dtype=dtype_name(dtype),
        device="described" if described else device.type,
        processor=None if described else processor_name(device),
        workloads=tuple(_workload(one) for one in predicted),
        dense=dense,
        pruned=tuple(pruned),
    )


def _require_applicable(request: BenchRequest) -> None:
    figures = {"--device-flops": request.device_flops, "--device-bandwidth": request.device_bandwidth}
    for option, figure in figures.items():
        if figure is None and any(figures.values()):
            raise UsageError(
                f"{option} is missing.", hint="Give both: --device-flops 989e12 --device-bandwidth 3.35e12 (an H100)."
            )
    given = {
        "--engine": request.engine != TRANSFORMERS,
        "--source": request.source is not None,
        "--compile": request.compile,
        "--static-cache": request.static_cache,
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(f"{option} does not apply to --estimate.", hint=f"Leave out {option}.")


def _removals(subject: Subject, request: BenchRequest) -> list[_Removal]:
    """Return the sizes that are asked for: of the plan or the named blocks, or else with average blocks."""
    if subject.surgery.removals:
        every = None if request.remove else request.every or 1
        surgeries = subject.sizes(replace(request, every=every))
        return [_Removal(len(surgery.removals), surgery.removals) for surgery in surgeries]
    blocks = subject.architecture.block_count
    step = max(1, math.ceil(blocks // 2 / ROWS)) if request.every is None else request.every
    asked = (*request.remove, *([] if request.every is None else [step]))
    for count in asked:
        if not 1 <= count < blocks:
            raise UsageError(f"Cannot remove {count} of {blocks} blocks.", hint=f"Name 1 to {blocks - 1}.")
    counts = sorted(set(request.remove)) or range(step, blocks // 2 + 1, step)
    return [_Removal(count, None) for count in counts]


def _predict(
    architecture: Architecture,
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device | None,
    request: BenchRequest,
) -> _Predicted:
    batch, prompt, new = workload.batch_size, workload.prompt_length, workload.new_tokens
    work = count_work(architecture, batch, prompt, new, dtype)
    if device is None:
        rate = Rate(request.device_flops or 1, request.device_bandwidth or 1)
        prefill = decode = Rates(rate, rate, Sizes(0, (0,) * architecture.block_count))
    else:
        overhead = measure_overhead(architecture, batch, dtype, device, generates=bool(new))

        def measured(tokens: int, head_tokens: int) -> Rates:
            return Rates(
                measure_rate(architecture, "block", tokens, dtype, device),
                measure_rate(architecture, "head", head_tokens, dtype, device),
                overhead,
            )

        prefill = measured(batch * prompt, batch if new else batch * prompt)
        decode = measured(batch, batch) if work.decode else prefill
    seconds = _seconds(work.prefill, prefill, 1)
    if work.decode:
        seconds += _seconds(work.decode, decode, new - 1)
    return _Predicted(workload, work, prefill, decode if work.decode else None, seconds)


def _seconds(cost: Cost, rates: Rates, calls: int) -> Sizes:
    """Return the seconds of each part in so many calls."""
    outside = rates.outside.seconds(cost.flops.outside, cost.bytes.outside)
    blocks = zip(cost.flops.blocks, cost.bytes.blocks, strict=True)
    return Sizes(outside, tuple(rates.blocks.seconds(*block) for block in blocks)) + rates.overhead * calls


def _cache(architecture: Architecture, workloads: Sequence[Workload], dtype: torch.dtype) -> Sizes | None:
    generating = [workload for workload in workloads if workload.new_tokens]
    if not generating:
        return None
    last = generating[-1]
    return cache_bytes(architecture, dtype, length=last.prompt_length + last.new_tokens, batch=last.batch_size)


def _size(
    architecture: Architecture,
    removal: _Removal,
    predicted: Sequence[_Predicted],
    cache: Sizes | None,
    dtype: torch.dtype,
) -> EstimatedSize:
    parameters = removal.of(count_parameters(architecture))
    return EstimatedSize(
        removed=removal.count,
        removals=removal.blocks,
        blocks=architecture.block_count - removal.count,
        parameters=round(parameters),
        weights_bytes=round(parameters * dtype.itemsize),
        kv_cache_bytes=round(removal.of(cache)) if cache else None,
        timings=tuple(_timing(one, removal) for one in predicted),
    )


def _timing(predicted: _Predicted, removal: _Removal) -> EstimatedTiming:
    prefill, decode, seconds = predicted.work.prefill, predicted.work.decode, removal.of(predicted.seconds)
    terms = [term for cost in (prefill, decode) if cost for term in (cost.flops, cost.bytes)]
    return EstimatedTiming(
        work=WorkRecord(
            prefill_flops=removal.of(prefill.flops),
            prefill_bytes=removal.of(prefill.bytes),
            decode_flops=removal.of(decode.flops) if decode else 0.0,
            decode_bytes=removal.of(decode.bytes) if decode else 0.0,
        ),
        seconds=seconds,
        speedup=_NOTHING.of(predicted.seconds) / seconds,
        bound=max(_NOTHING.of(term) / removal.of(term) for term in terms),
    )


def _workload(predicted: _Predicted) -> EstimatedWorkload:
    workload = predicted.workload
    return EstimatedWorkload(
        name=workload.name,
        batch_size=workload.batch_size,
        prompt_length=workload.prompt_length,
        new_tokens=workload.new_tokens,
        prefill=_rates(predicted.prefill),
        decode=_rates(predicted.decode) if predicted.decode else None,
    )


def _rates(rates: Rates) -> RateRecord:
    return RateRecord(
        blocks_flops_per_second=rates.blocks.flops_per_second,
        blocks_bytes_per_second=rates.blocks.bytes_per_second,
        outside_flops_per_second=rates.outside.flops_per_second,
        outside_bytes_per_second=rates.outside.bytes_per_second,
        block_overhead_seconds=sum(rates.overhead.blocks) / len(rates.overhead.blocks),
        outside_overhead_seconds=rates.overhead.outside,
    )
