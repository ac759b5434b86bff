"""From what the user wants to reach to a target that the search can hold each removal against: counted, or timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.benchmark import time_in_turn
from sleb_cli.engine.loading import choose_dtype, dtype_name, free_memory, load_pruned
from sleb_cli.engine.search.budget import parse_bytes
from sleb_cli.engine.search.greedy import Protection, count_to_remove, parse_ratio
from sleb_cli.engine.search.targets import (
    SizeTarget,
    Target,
    TargetRequest,
    fit_slope,
    loss_target,
    parse_count,
    parse_number,
)
from sleb_cli.engine.sizes import Sizes, cache_bytes, count_parameters, is_quantized, stored_bytes
from sleb_cli.engine.subject import Subject
from sleb_cli.engine.surgery import Surgery
from sleb_cli.engine.windows import choose_length
from sleb_cli.engine.workloads import BenchRequest, settle_workload
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import ServingRecord, TargetName, TargetRecord
from sleb_cli.results import Workload
from sleb_cli.units import count, size
from sleb_plugins import UnsupportedModelError, UsageError

DEFAULT_SERVE_LENGTH = 4096
LEAST_SPEEDUP = 1.01


@dataclass(frozen=True)
class Aim:
    """What a target is settled for: the model, as it is searched."""

    architecture: Architecture
    protection: Protection
    dtype: torch.dtype
    device: torch.device
    notify: Notify

    @property
    def free(self) -> int:
        """How many blocks may go; one stays in any case."""
        blocks = self.architecture.block_count
        return min(len(self.protection.candidates(blocks, ())), blocks - 1)

    def target(self, request: TargetRequest) -> Target | None:
        """Give the target, or None where it takes measuring: --target-speedup.

        Raises:
            UsageError: it is not said in one way, or no number; or so many blocks cannot go.
            UnsupportedModelError: how large the KV cache is cannot be told.
        """
        name = request.chosen()
        if name in ("ratio", "remove"):
            return self._count(name, request)
        if name == "target_params":
            asked = str(request.target_params)
            sizes = count_parameters(self.architecture)
            return SizeTarget(name, asked, sizes, parse_count(asked, name), lambda n: f"{count(n)} parameters")
        if name == "target_memory":
            return self._memory(request)
        if name == "target_speedup":
            parse_number(str(request.target_speedup), name, least=LEAST_SPEEDUP)
            return None
        return loss_target(request, name)

    def _count(self, name: TargetName, request: TargetRequest) -> SizeTarget:
        blocks = self.architecture.block_count
        ratio = parse_ratio(request.ratio) if request.ratio is not None else None
        remove = count_to_remove(blocks, self.protection, ratio=ratio, remove=request.remove)
        each = Sizes(0, (1,) * blocks)
        return SizeTarget(name, str(getattr(request, name)), each, blocks - remove, lambda n: f"{n:g} blocks")

    def _memory(self, request: TargetRequest) -> SizeTarget:
        asked = str(request.target_memory)
        most = parse_bytes(asked, "--target-memory")
        serving = self.serving(request)
        dtype = getattr(torch, serving.dtype)
        packed = is_quantized(self.architecture) and request.serve_dtype is None
        weights = stored_bytes(self.architecture) if packed else count_parameters(self.architecture) * dtype.itemsize
        cache = cache_bytes(self.architecture, dtype, length=serving.length, batch=serving.batch)
        how = "packed as in the checkpoint" if packed else f"in {serving.dtype}"
        self.notify(
            Notice(
                f"Memory is counted as weights {how}, {size(weights.without(()))}, and a KV cache in {serving.dtype} "
                f"for {serving.batch} x {serving.length} tokens, {size(cache.without(()))}."
            )
        )
        return SizeTarget("target_memory", asked, weights + cache, most, size)

    def serving(self, request: TargetRequest) -> ServingRecord:
        """Say how the model will be served: in the data type of the search, one sequence of up to 4,096 tokens."""
        if request.serve_batch is not None and request.serve_batch < 1:
            raise UsageError(f"--serve-batch {request.serve_batch} is too small.", hint="Take 1 or more.")
        named = request.serve_dtype
        dtype = choose_dtype(named, self.architecture, self.device) if named else self.dtype
        length = choose_length(request.serve_length, self.architecture, DEFAULT_SERVE_LENGTH, "--serve-length")
        return ServingRecord(dtype=dtype_name(dtype), length=length, batch=request.serve_batch or 1)


@dataclass(frozen=True)
class Stopwatch:
    """Times pruned models beside the dense one in memory, as `bench` does."""

    aim: Aim
    model: Callable[[], Any]
    request: TargetRequest

    @cached_property
    def workload(self) -> Workload:
        """What is timed: generation, where the user named nothing else."""
        dense = Subject(Surgery(self.aim.architecture, ()), None)
        name = self.request.workload or "generation"
        return settle_workload(name, BenchRequest((name,)), dense, self.aim.device, self.aim.notify)

    def share(self, removals: Sequence[int]) -> float:
        """Give the time that the model takes without these blocks, as a share of the dense model's."""
        aim = self.aim
        pruned = load_pruned(Surgery(aim.architecture, tuple(removals)), aim.dtype, aim.device, aim.notify)
        seconds = time_in_turn(self.workload, {"dense": self.model(), "pruned": pruned}, aim.notify)
        del pruned
        free_memory()
        return statistics.median(seconds["pruned"]) / statistics.median(seconds["dense"])

    def record(self, target: SizeTarget, removals: Sequence[int]) -> TargetRecord:
        """Say what was reached: timed once more, without the blocks that were found."""
        predicted, measured = 1 / target.sizes.without(removals), 1 / self.share(removals)
        return TargetRecord(
            name="target_speedup",
            asked=target.asked,
            limit=1 / target.most,
            dense=1,
            reached=measured,
            predicted=predicted,
            workload=self.workload.name,
        )

    def target(self, candidates: Callable[[Sequence[int]], Sequence[int]]) -> SizeTarget:
        """Time the model at two depths, and reckon what each block takes.

        Raises:
            UsageError: the model does not become faster.
        """
        gone = self._some(candidates)
        depths = sorted({max(1, len(gone) // 2), len(gone)})
        shares = [self.share(gone[:depth]) for depth in depths]
        slope = fit_slope(depths, shares)
        blocks, workload = self.aim.architecture.block_count, self.workload.name
        found = ", ".join(f"{share:.0%} ({n} less)" for n, share in zip(depths, shares, strict=True))
        self.aim.notify(
            Notice(f"Timed with fewer blocks, {workload} takes {found} of the dense model's time: {slope:.1%} a block.")
        )
        if slope <= 0:
            raise UsageError(
                f"Here, {workload} does not become faster with fewer blocks.",
                hint="Try when nothing else runs, or take --ratio and measure with `sleb bench`.",
            )
        asked = str(self.request.target_speedup)
        speedup = parse_number(asked, "target_speedup", least=LEAST_SPEEDUP)
        seconds = Sizes(1 - slope * blocks, (slope,) * blocks)
        return SizeTarget("target_speedup", asked, seconds, 1 / speedup, lambda share: f"{1 / share:.2f}x the speed")

    def _some(self, candidates: Callable[[Sequence[int]], Sequence[int]]) -> list[int]:
        """Take two thirds of the blocks that may go, or as many as may go together, from the middle on."""
        gone: list[int] = []
        while len(gone) < max(1, self.aim.free * 2 // 3):
            try:
                free = candidates(tuple(gone))
            except UnsupportedModelError:
                if not gone:
                    raise
                break
            gone.append(free[len(free) // 2])
        return gone
