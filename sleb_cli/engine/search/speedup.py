"""`--target-speedup`: time pruned models to turn a speedup into a target, and to measure the one reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb_cli.engine.device import free_memory
from sleb_cli.engine.model.sizes import Sizes
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.resolve import ResolvedSearch
from sleb_cli.engine.search.targets import SizeTarget, parse_number
from sleb_cli.engine.speed.benchmark import share_of_time
from sleb_cli.engine.speed.workloads import make_workload
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import TargetRecord
from sleb_cli.requests import DEFAULT_WORKLOAD
from sleb_cli.results import Workload
from sleb_plugins import UnsupportedModelError, UsageError


@dataclass(frozen=True)
class SpeedupTimer:
    """Time pruned models in alternation with the dense one, as `bench` does."""

    resolved: ResolvedSearch
    model: Any
    group: ProcessGroup
    notify: Notify

    @cached_property
    def workload(self) -> Workload:
        """The timed workload: generation, as `bench` times it by default."""
        positions = self.resolved.architecture.longest_sequence
        return make_workload(DEFAULT_WORKLOAD, self.resolved.placement.device, positions)

    def share(self, removals: Sequence[int]) -> float:
        """Return the time of the model without these blocks, as a share of the dense model's, in the main process."""

        def measure() -> float:
            surgery, place = Surgery(self.resolved.architecture, tuple(removals)), self.resolved.placement
            pruned = load_pruned(surgery, place.dtype, place.device, self.notify, dense=self.model)
            share = share_of_time(self.workload, self.model, pruned, surgery.removals, self.notify)
            del pruned
            free_memory()
            return share

        return self.group.from_main(measure)

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

    def target(self) -> SizeTarget:
        """Time the model at two depths, and estimate the time per block.

        Raises:
            UsageError: the model does not get faster with fewer blocks.
        """
        gone = self._removable_sample()
        depths = sorted({max(1, len(gone) // 2), len(gone)})
        shares = [self.share(gone[:depth]) for depth in depths]
        slope = fit_slope(depths, shares)
        blocks, workload = self.resolved.architecture.block_count, self.workload.name
        timed = ", ".join(f"{share:.0%} ({n} fewer)" for n, share in zip(depths, shares, strict=True))
        self.notify(
            Notice(f"With fewer blocks, {workload} takes {timed} of the dense model's time: {slope:.1%} per block.")
        )
        if slope <= 0:
            raise UsageError(
                f"On this machine, {workload} does not get faster with fewer blocks.",
                hint="Try again when nothing else is running, or use --ratio and measure with `sleb bench`.",
            )
        asked = str(self.resolved.request.target_speedup)
        seconds, most = Sizes(1 - slope * blocks, (slope,) * blocks), 1 / parse_number(asked, "target_speedup")
        return SizeTarget("target_speedup", asked, seconds, most, lambda share: f"{1 / share:.2f}x the speed")

    def _removable_sample(self) -> list[int]:
        """Return two thirds of the candidates, or as many as can go together; each is the middle one of those left."""
        candidates, gone = self.resolved.removable.candidates, list[int]()
        free = candidates(())
        most = max(1, len(free) * 2 // 3)
        while len(gone) < most:
            gone.append(free[len(free) // 2])
            try:
                free = candidates(gone)
            except UnsupportedModelError:
                break
        return gone


def fit_slope(removed: Sequence[int], share: Sequence[float]) -> float:
    """Return the share of the dense model's time that one block takes: a least-squares fit through the dense model.

    `share` holds the pruned model's time as a share of the dense model's for each number of `removed` blocks, modelled
    as 1 - slope x removed.
    """
    return sum(n * (1 - s) for n, s in zip(removed, share, strict=True)) / sum(n * n for n in removed)
