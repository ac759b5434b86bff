"""Which blocks may go next: those that nobody protects, and without which the others stay what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_plugins import UnsupportedModelError


class Removable:
    """The candidates of each step of a search. Each is tried on the model without weights, so `apply` will not refuse.

    Where blocks are all of one kind, the outermost candidates speak for all: one moves every other block, one none.
    """

    def __init__(self, architecture: Architecture, protection: Protection, notify: Notify) -> None:
        self.architecture, self.protection, self.notify = architecture, protection, notify
        self._known: dict[tuple[int, ...], list[int]] = {}

    def candidates(self, removed: Sequence[int]) -> list[int]:
        """Give the blocks that may go after `removed`; what was found once is not tried again.

        Raises:
            UnsupportedModelError: none may; the sentence says why.
        """
        found = tuple(sorted(removed))
        if found not in self._known:
            self._known[found] = self._try(removed)
        return self._known[found]

    def _try(self, removed: Sequence[int]) -> list[int]:
        architecture = self.architecture
        after = f" after {', '.join(map(str, removed))}" if removed else ""
        fewer = f"Ask for {len(removed)} removals: with --resume, nothing is measured again."
        free = self.protection.candidates(architecture.block_count, removed)
        if not free:
            raise UnsupportedModelError(
                f"No block is left that may go{after}.", hint=fewer if removed else "Protect fewer."
            )
        alike = not any(architecture.kinds)
        if alike and not any(self._obstacle(removed, block) for block in (free[0], free[-1])):
            return free
        stay = {block: why for block, why in zip(free, self._obstacles(removed, free), strict=True) if why}
        if len(stay) == len(free):
            raise UnsupportedModelError(
                f"No block of {architecture.source.id} ({architecture.config.model_type}) can go{after}: "
                f"without block {free[0]}, {stay[free[0]]}.",
                hint=fewer if removed else "docs/families.md says what each family allows.",
            )
        if stay and not removed:
            block, why = next(iter(stay.items()))
            names = f"Block {block} stays" if len(stay) == 1 else f"Blocks {', '.join(map(str, stay))} stay"
            self.notify(Notice(f"{names}: without block {block}, {why}."))
        return [block for block in free if block not in stay]

    def _obstacles(self, removed: Sequence[int], free: Sequence[int]) -> Iterator[str | None]:
        """Try each; of the first step it is told, since a deep model takes some seconds."""
        task = "Trying what can go"
        notify = self.notify if not removed else lambda event: None
        notify(TaskStarted(task, len(free), "blocks"))
        for block in free:
            yield self._obstacle(removed, block)
            notify(TaskAdvanced(task))
        notify(TaskFinished(task))

    def _obstacle(self, removed: Sequence[int], block: int) -> str | None:
        return Surgery(self.architecture, (*removed, block)).obstacle()
