"""The tensors and settings of a model that remain after a removal. No weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn

from sleb_cli.engine.cut.blocks.block_cut import plan_blocks
from sleb_cli.engine.cut.kinds import CUTS
from sleb_cli.engine.cut.protocol import Cut
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.names import checkpoint_name
from sleb_cli.order import SizeKey
from sleb_cli.units import plural
from sleb_plugins.config_keys import Kept, kept_blocks

T = TypeVar("T")


@dataclass(frozen=True)
class Surgery:
    """The cuts of one model, on disk or in memory, in order.

    `other_cuts` holds what `plan_surgery` was given besides the blocks.
    """

    architecture: Architecture
    cuts: tuple[Cut, ...] = ()
    other_cuts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def removals(self) -> tuple[int, ...]:
        """The removed blocks, numbered as in the original, in the order of their removal."""
        return tuple(block for cut in self.cuts for block in cut.removals)

    @cached_property
    def size_key(self) -> SizeKey:
        """The key of this size in results."""
        return tuple(item for cut in self.cuts for item in cut.size_key)

    @property
    def description(self) -> str:
        """The parts that go, to be read after "without"."""
        parts = []
        if self.removals or not self.cuts:
            parts.append(plural(len(self.removals), "block"))
        for cut in self.cuts:
            if not cut.removals:
                parts.append(cut.description)
        return " and ".join(parts)

    @property
    def name(self) -> str:
        """The name of the checkpoint, if none is given."""
        words = [word for cut in self.cuts for word in cut.name_parts]
        return checkpoint_name(self.architecture.source.name, len(self.kept.blocks), words)

    @property
    def removed(self) -> frozenset[int]:
        """The removed blocks, unordered."""
        return frozenset(self.removals)

    @cached_property
    def kept(self) -> Kept:
        """The blocks that stay."""
        return kept_blocks(self.architecture.block_count, self.removals)

    @cached_property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens that stay, ascending, by their old numbers; None if all do."""
        for cut in self.cuts:
            if cut.tokens is not None:
                return cut.tokens
        return None

    def settings(self, file: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the contents of a file of settings after all cuts."""
        changed = dict(values)
        for cut in self.cuts:
            changed = cut.settings(file, changed)
        return changed

    def prune_config(self) -> dict[str, Any]:
        """Return the `config.json` of the pruned model."""
        return self.settings(CONFIG, self.architecture.source.raw_config)

    def tensors(
        self, named: Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, T, tuple[Slices, ...]]]:
        """Drop the tensors that go, rename the others, and add the slices that stay of each."""
        for old_name, value in named:
            name = old_name
            slices = []
            for cut in self.cuts:
                remaining = cut.tensor(name)
                if remaining is None:  # it goes
                    break
                name, of_cut = remaining
                if of_cut:
                    slices.append(of_cut)
            else:
                yield name, value, tuple(slices)

    @contextmanager
    def simulate(self, dense: nn.Module) -> Iterator[None]:
        """Have the dense model, whose `removals` are skipped, compute as if all cuts were made."""
        with ExitStack() as stack:
            for cut in self.cuts:
                stack.enter_context(cut.simulate(dense))
            yield

    def token_ids(self, ids: Sequence[int]) -> list[int | None]:
        """Return the new numbers of these tokens, [positions]; None for one that goes."""
        if self.tokens is None:
            return list(ids)
        return [self._new_token.get(token) for token in ids]

    @cached_property
    def _new_token(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.tokens or ())}


def plan_surgery(
    architecture: Architecture,
    removals: Iterable[int],
    other_cuts: Mapping[str, Any] = MappingProxyType({}),
) -> Surgery:
    """Plan the removal of these blocks and the other cuts, checked on the model.

    `other_cuts` holds the values of options in `CUTS`.
    """
    blocks = tuple(removals)
    cuts: list[Cut] = []
    if blocks:
        cuts.append(plan_blocks(architecture, blocks))
    for option, value in other_cuts.items():
        cuts.append(CUTS[option].plan(architecture, value))
    return Surgery(architecture, tuple(cuts), dict(other_cuts))
