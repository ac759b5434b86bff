"""`--target-speedup`: time pruned models to turn a speedup into a target, and to measure the one reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.model.sizes import Sizes
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.context import LEAST_SPEEDUP, SearchContext
from sleb_cli.engine.search.targets import (
    SizeTarget,
    fit_slope,
    parse_number,
)
from sleb_cli.engine.speed.benchmark import time_in_turn
from sleb_cli.engine.speed.workloads import resolve_workload
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice
from sleb_cli.plan import TargetRecord
from sleb_cli.requests import DEFAULT_WORKLOAD, BenchRequest, TargetRequest
from sleb_cli.results import Workload
from sleb_plugins import UnsupportedModelError, UsageError


@dataclass(frozen=True)
class SpeedupTimer:
    """Time pruned models in alternation with the dense one, as `bench` does."""

    context: SearchContext
    model: Callable[[], Any]
    request: TargetRequest
    group: ProcessGroup

    @cached_property
    def workload(self) -> Workload:
        """The timed workload; generation by default."""
        dense = Subject(Surgery(self.context.architecture, ()), None)
        name = self.request.target_workload or DEFAULT_WORKLOAD
        return resolve_workload(name, BenchRequest(), dense, self.context.device, self.context.notify)

    def share(self, removals: Sequence[int]) -> float:
        """Return the time of the model without these blocks, as a share of the dense model's, in the main process."""
        return self.group.from_main(lambda: self._share(removals))

    def _share(self, removals: Sequence[int]) -> float:
        context = self.context
        surgery, dense = Surgery(context.architecture, tuple(removals)), self.model()
        pruned = load_pruned(surgery, context.dtype, context.device, context.notify, dense=dense)
        seconds = time_in_turn(self.workload, {"dense": dense, "pruned": pruned}, context.notify)
        del pruned
        free_memory()
        return statistics.median(seconds["pruned"]) / statistics.median(seconds["dense"])

    def record(self, target: SizeTarget, removals: Sequence[int]) -> TargetRecord:
        """Return the speedup reached, timed again without the blocks that the search removed."""
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
        """Time the model at two depths, and estimate the time per block.

        Raises:
            UsageError: the model does not get faster with fewer blocks.
        """
        gone = self._removable_sample(candidates)
        depths = sorted({max(1, len(gone) // 2), len(gone)})
        shares = [self.share(gone[:depth]) for depth in depths]
        slope = fit_slope(depths, shares)
        blocks, workload = self.context.architecture.block_count, self.workload.name
        timed = ", ".join(f"{share:.0%} ({n} fewer)" for n, share in zip(depths, shares, strict=True))
        self.context.notify(
            Notice(f"With fewer blocks, {workload} takes {timed} of the dense model's time: {slope:.1%} per block.")
        )
        if slope <= 0:
            raise UsageError(
                f"On this machine, {workload} does not get faster with fewer blocks.",
                hint="Try again when nothing else is running, or use --ratio and measure with `sleb bench`.",
            )
        asked = str(self.request.target_speedup)
        speedup = parse_number(asked, "target_speedup", least=LEAST_SPEEDUP)
        seconds = Sizes(1 - slope * blocks, (slope,) * blocks)
        return SizeTarget("target_speedup", asked, seconds, 1 / speedup, lambda share: f"{1 / share:.2f}x the speed")

    def _removable_sample(self, candidates: Callable[[Sequence[int]], Sequence[int]]) -> list[int]:
        """Return two thirds of the candidates, or as many as can go together; each is the middle one of those left."""
        gone: list[int] = []
        while len(gone) < max(1, self.context.free * 2 // 3):
            try:
                free = candidates(tuple(gone))
            except UnsupportedModelError:
                if not gone:
                    raise
                break
            gone.append(free[len(free) // 2])
        return gone
