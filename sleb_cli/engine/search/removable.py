"""The blocks that may be removed next: not protected, and no other block depends on them."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.choices import NoBlockLeft, Protection
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.units import plural


class Removable:
    """The candidates of each step; each is tried without weights, so `apply` can remove it."""

    def __init__(self, architecture: Architecture, protection: Protection, notify: Notify) -> None:
        self.architecture = architecture
        self.protection = protection
        self.notify = notify
        self._known: dict[tuple[int, ...], list[int]] = {}

    def candidates(self, removed: Sequence[int]) -> list[int]:
        """Return the removable blocks after `removed`, in order; raise NoBlockLeft if none."""
        gone = tuple(sorted(removed))
        if gone not in self._known:
            self._known[gone] = self._try(removed)
        return self._known[gone]

    def _try(self, removed: Sequence[int]) -> list[int]:
        architecture = self.architecture
        after = ""
        remove_fewer = None
        if removed:
            after = f" after {', '.join(map(str, removed))}"
            blocks = plural(len(removed), "block")
            remove_fewer = f"Remove {blocks}. With --resume, nothing is measured again."
        free = self.protection.candidates(architecture.block_count, removed)
        if not free:
            raise NoBlockLeft(
                f"No block can be removed{after}.", hint=remove_fewer or "Protect fewer blocks."
            )
        # Of blocks of one kind, the outermost are enough: removing the first renumbers all later
        # blocks, the last none.
        is_uniform = not any(architecture.kinds)
        outermost = (free[0], free[-1])
        if is_uniform and not any(self._obstacle(removed, block) for block in outermost):
            return free
        obstacles = {}
        # The first step takes some seconds on a deep model.
        notify = ignore if removed else self.notify
        with task(notify, "Checking which blocks can be removed", len(free), "blocks") as advance:
            for block in free:
                obstacle = self._obstacle(removed, block)
                if obstacle:
                    obstacles[block] = obstacle
                advance()
        if len(obstacles) == len(free):
            raise NoBlockLeft(
                f"No block of {architecture.source.id} ({architecture.config.model_type}) can be "
                f"removed{after}: without block {free[0]}, {obstacles[free[0]]}.",
                hint=remove_fewer or architecture.families_hint,
            )
        if obstacles and not removed:
            first = min(obstacles)
            which = f"Block {first} stays"
            if len(obstacles) > 1:
                which = f"Blocks {', '.join(map(str, obstacles))} stay"
            self.notify(Notice(f"{which}: without block {first}, {obstacles[first]}."))
        return [block for block in free if block not in obstacles]

    def _obstacle(self, removed: Sequence[int], block: int) -> str | None:
        return BlockCut(self.architecture, (*removed, block)).obstacle()
