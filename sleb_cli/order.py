"""What goes of a model, in which order, and the words for it.

A plan and a result each have an `Order`. What reads them asks it, and need not know what kind of
parts goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sleb_cli.units import plural, spans

SizeKey = tuple[int, ...]
"""The key of a pruned model among those that are measured together; the dense one's is ().

For blocks: the removed ones. For experts: (0, 1, ..., n-1), where n experts of each block go. Only
its length counts.
"""

OTHER: SizeKey = (0,)
"""The key of another model, which is compared with the dense one."""

BLOCKS = "blocks"
PER_TOKEN = "experts per token"


@dataclass(frozen=True)
class Order:
    """The parts of a model that go, in order.

    Attributes:
        unit: blocks, parts that each block has (experts), or experts per token.
        count: how many of them the dense model has, or each of its blocks, or a token uses.
        size_keys: the key of each size, fewest removals first; none if only results are known.
        removed: the parts of each block that go, in order; none if whole blocks go.
        multiple: sizes are multiples of this, if as many parts go of each group of a block.
        ranking: a hash of the order of all parts; None if whole blocks go, which keys name.
    """

    unit: str
    count: int
    size_keys: tuple[SizeKey, ...] = ()
    removed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    multiple: int = 1
    ranking: str | None = None

    @property
    def whole_blocks(self) -> bool:
        """Whether whole blocks go, so that those that stay are as they were."""
        return self.unit == BLOCKS

    @property
    def parts(self) -> str:
        """What is counted: "blocks", or "experts of each block"."""
        return BLOCKS if self.whole_blocks else f"{self.unit} of each block"

    @property
    def recovered(self) -> str:
        """What a recovery gives new weights."""
        return "remaining blocks" if self.whole_blocks else "routers"

    @property
    def caveat(self) -> str | None:
        """What users must know of every model without such parts."""
        if self.whole_blocks:
            return None
        return (
            "What the text of the search does not use may be gone: measure other uses before you "
            "rely on them."
        )

    def by_size(self, size: int) -> tuple[SizeKey, dict[str, Any]]:
        """Return the blocks that go at a size, and the other cuts, as `plan_surgery` takes them."""
        if self.whole_blocks:
            return self.size_keys[size - 1], {}
        return (), {self.unit: {block: parts[:size] for block, parts in self.removed.items()}}

    def describe(self, key: SizeKey) -> str:
        """Describe a size: "without blocks 3, 7", "without 2 of the 8 experts of each block"."""
        if self.unit == PER_TOKEN:
            return f"with {plural(self.count - len(key), 'expert')} per token"
        if self.whole_blocks:
            return f"without block{'' if len(key) == 1 else 's'} {spans(key)}"
        return f"without {self.amount(len(key))}"

    def amount(self, size: int) -> str:
        """Write how many parts go: "6 of 30 blocks", "2 of the 8 experts of each block"."""
        the = "" if self.whole_blocks else "the "
        return f"{size} of {the}{self.count} {self.parts}"

    def block_ratio(self, size: int) -> float | None:
        """Return dense over remaining blocks, about the speedup of a large model.

        None if every block stays.
        """
        return self.count / (self.count - size) if self.whole_blocks else None
