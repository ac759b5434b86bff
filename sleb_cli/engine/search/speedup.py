"""`--target-speedup`: time pruned models, to turn a speed-up into a number of blocks and to check
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.device import free_memory
from sleb_cli.engine.model.sizes import PerBlock
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.targets import SizeTarget
from sleb_cli.engine.speed.benchmark import relative_time
from sleb_cli.engine.speed.workloads import make_workload
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import TargetRecord
from sleb_cli.requests import DEFAULT_WORKLOAD
from sleb_plugins import UnsupportedModelError, UsageError

Share = Callable[[Collection[int]], float]
"""Times the model without these blocks, as a share of the dense model's time."""


@dataclass(frozen=True, kw_only=True)
class SpeedTarget(SizeTarget):
    """Stop once the model should be fast enough; its size is a share of the dense model's time."""

    share: Share

    def record(
        self, removed: Collection[int], increase: float, following: float | None
    ) -> TargetRecord:
        """Return the speed-up reached, timed again without the removed blocks."""
        return TargetRecord(
            name=self.name,
            limit=1 / self.limit,
            dense=1,
            reached=1 / self.share(removed),
            predicted=1 / self.sizes.without(removed),
        )


def time_target(
    speedup: float,
    removable: Removable,
    placement: Placement,
    dense: Any,
    group: ProcessGroup,
    notify: Notify,
) -> SpeedTarget:
    """Time the model at two depths in turn with the dense one, as `bench` does, and estimate the
    time per block.
    """
    architecture = removable.architecture
    workload = make_workload(DEFAULT_WORKLOAD, placement.device, architecture.longest_sequence)

    def share(removals: Collection[int]) -> float:
        def measure() -> float:
            surgery = Surgery(architecture, (BlockCut(architecture, tuple(removals)),))
            pruned = load_pruned(surgery, placement, notify, dense=dense)
            share = relative_time(workload, dense, pruned, surgery.removals, notify)
            del pruned
            free_memory()
            return share

        return group.from_main(measure)

    gone = _removable_sample(removable)
    depths = sorted({max(1, len(gone) // 2), len(gone)})
    shares = [share(gone[:depth]) for depth in depths]
    # A least-squares fit through the dense model: without n blocks, the share of its time is 1 -
    # slope n.
    slope = sum(n * (1 - s) for n, s in zip(depths, shares, strict=True)) / sum(
        n * n for n in depths
    )
    timed = ", ".join(f"{share:.0%} ({n} fewer)" for n, share in zip(depths, shares, strict=True))
    name = workload.name
    notify(
        Notice(
            f"With fewer blocks, {name} takes {timed} of the dense model's time: {slope:.1%} per "
            f"block."
        )
    )
    if slope <= 0:
        raise UsageError(
            f"On this machine, {name} does not get faster with fewer blocks.",
            hint="Try again when nothing else is running, or use --ratio and measure with `sleb "
            "bench`.",
        )
    blocks = architecture.block_count
    seconds, limit = PerBlock(1 - slope * blocks, (slope,) * blocks), 1 / speedup
    return SpeedTarget(
        "target_speedup", seconds, limit, lambda left: f"{1 / left:.2f}x the speed", share=share
    )


def _removable_sample(removable: Removable) -> list[int]:
    # Two thirds of the candidates, or as many as can go together, from the middle.
    gone = list[int]()
    free = removable.candidates(())
    count = max(1, len(free) * 2 // 3)
    while len(gone) < count:
        gone.append(free[len(free) // 2])
        try:
            free = removable.candidates(gone)
        except UnsupportedModelError:
            break
    return gone
