"""The cut of experts: the settings and tensors that change, and the dense model without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.cut.experts.routing import (
    Routing,
    TiesByNumber,
    watch_routing,
    without_experts,
)
from sleb_cli.engine.cut.protocol import Cut, Removal
from sleb_cli.engine.cut.quantization import ModuleNames
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import PREDICTION
from sleb_cli.engine.model.expert_settings import with_setting
from sleb_cli.engine.model.experts import find_experts
from sleb_cli.results import ExpertsRecord
from sleb_plugins import PlanError

PREDICTION_NOTE = (
    "No text scores the experts for multi-token prediction: those of the last block's numbers stay "
    "there."
)

Removed = Mapping[int, Sequence[int]]
"""The experts that go, by block, in the order of their removal: as many of each."""


@dataclass(frozen=True)
class ExpertRemoval(Removal):
    """What cuts of experts from checkpoints and from GGUF files share.

    Attributes:
        count: the number of experts in a block.
    """

    count: int
    removed: Removed

    @property
    def fewer(self) -> int:
        """The number of experts that go from each block."""
        return len(next(iter(self.removed.values())))

    @property
    def size_key(self) -> tuple[int, ...]:
        """(0, ..., n-1), if n experts of each block go."""
        return tuple(range(self.fewer))

    @property
    def name_parts(self) -> tuple[str, ...]:
        """The words that it adds to the name of a checkpoint."""
        return (f"{self.count - self.fewer}-experts",)

    def kept_experts(self, block: int) -> tuple[int, ...]:
        """Return the experts of a block that stay.

        A block for multi-token prediction keeps the last block's.
        """
        removed = self.removed.get(block, self.removed[max(self.removed)])
        return tuple(sorted({*range(self.count)}.difference(removed)))

    def record(self, sizes: Mapping[str, tuple[int, int]]) -> Mapping[str, ExpertsRecord]:
        """Return a block's numbers of experts before and after, and the sizes of the model."""
        return {"experts": ExpertsRecord(experts=(self.count, self.count - self.fewer), **sizes)}


@dataclass(frozen=True)
class ExpertCut(ExpertRemoval, Cut):
    """The cut of experts from a checkpoint."""

    architecture: Architecture

    reference = "fewer experts"
    extra_check = "every expert"
    tolerance = 1e-4  # the router's product has another width; 3.6e-5 was the most of 58 families

    @property
    def description(self) -> str:
        """The parts that go, to be read after "without"."""
        return f"{self.fewer} of the {self.count} experts of each block"

    @property
    def note(self) -> str | None:
        """A note on blocks for multi-token prediction."""
        for name in self.architecture.source.weights.tensor_names():
            block, _ = self._split(name)
            if block is not None and block >= self.architecture.block_count:
                return PREDICTION_NOTE
        return None

    def _split(self, name: str) -> tuple[int | None, str]:
        """Return the block of a tensor and its name there.

        Blocks for multi-token prediction follow the last one.
        """
        block, inner = self.architecture.names.split(name)
        prediction = PREDICTION.search(name)
        if block is not None or prediction is None:
            return block, inner
        # The name in the block may follow a path of any length, so it is the longest end that
        # experts have.
        experts = find_experts(self.architecture)
        end = prediction[1]
        while end:
            if end in experts.parts or experts.numbered_in(end):
                return self.architecture.block_count, end
            end = end.partition(".")[2]
        return None, name

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the config with the new count; any file may name the modules of one expert."""
        if file == CONFIG:
            key = find_experts(self.architecture).key
            values = with_setting(self.architecture, values, key, self.count - self.fewer)
        return ModuleNames(self.architecture, self._renamed).settings(file, values)

    def _renamed(self, name: str) -> str | None:
        renamed = self.tensor(name)
        return None if renamed is None else renamed[0]

    def tensor(self, name: str) -> tuple[str, Slices | None] | None:
        """Return the new name of a tensor of one expert, or the slices that stay of one of all."""
        block, inner = self._split(name)
        if block is None or (block < self.architecture.block_count and block not in self.removed):
            return name, None
        kept_experts = self.kept_experts(block)
        experts = find_experts(self.architecture)
        if inner in experts.parts:
            part = experts.parts[inner]
            return name, Slices(
                part.axis, part.units, (*kept_experts, *range(self.count, part.units))
            )
        numbered = experts.numbered_in(inner)
        if numbered is None:
            return name, None
        before, old, after = numbered
        if old >= self.count:  # such experts compute nothing, and stay
            new = old - self.fewer
        elif old in kept_experts:
            new = kept_experts.index(old)
        else:
            return None
        return f"{name.removesuffix(inner)}{before}{new}{after}", None

    def simulate(self, dense: nn.Module) -> AbstractContextManager[object]:
        """Have the dense model's routers choose among the experts that stay."""
        blocks = [*self.architecture.blocks_of(dense)]
        return without_experts(
            find_experts(self.architecture),
            blocks,
            self.removed,
            self.architecture.config.model_type,
        )

    def break_ties(self) -> AbstractContextManager[object]:
        """Break ties by number, an order that the cut keeps."""
        return TiesByNumber()

    @contextmanager
    def extra_outputs(self, model: nn.Module, *, pruned: bool) -> Iterator[Mapping[str, Tensor]]:
        """Run each expert that stays once on random states: a prompt may not reach it."""
        experts = find_experts(self.architecture)
        if pruned:
            experts = replace(experts, count=self.count - self.fewer)
        outputs = {f"the experts of block {block}": torch.empty(0) for block in experts.blocks}

        def run_each(block: int, routing: Routing) -> None:
            name = f"the experts of block {block}"
            if outputs[name].numel() or not len(routing.hidden):
                return
            kept_experts = self.kept_experts(block)
            # Drawn by the number of the block, so that both models get the same states.
            random = torch.Generator().manual_seed(block)
            states = torch.randn(len(kept_experts), routing.hidden.shape[-1], generator=random)
            numbers = torch.tensor(range(len(kept_experts)) if pruned else kept_experts)
            outputs[name] = routing.run_alone(
                states.to(routing.hidden), numbers.to(routing.experts.device)
            ).cpu()

        with watch_routing(experts, [*self.architecture.blocks_of(model)], run_each):
            yield outputs


def plan_experts(architecture: Architecture, removed: Removed) -> ExpertCut:
    """Plan the removal of these experts, checked against the model."""
    experts = find_experts(architecture)
    if {*removed} != {*experts.blocks}:
        raise PlanError(
            f"The plan removes experts of {len(removed)} blocks, but {architecture.source.id} has "
            f"experts in {len(experts.blocks)}, and each must keep as many.",
            hint="Search again.",
        )
    require_removable(
        removed, experts.count, experts.active, experts.groups, architecture.source.id
    )
    return ExpertCut(experts.count, removed, architecture)


def require_removable(removed: Removed, count: int, active: int, groups: int, name: str) -> None:
    """Refuse experts that a model with `count` in each block, in `groups`, cannot do without."""
    number = len(next(iter(removed.values()), ()))
    min_kept = max(active, 1)
    if groups > 1:
        min_kept = max(active, 2 * groups)  # a group is chosen by its best two
    why = None
    if not 0 < number <= count - min_kept:
        why = f"{number} of {count} would go, and at least {min_kept} must stay"
    for block, experts in removed.items():
        by_group = [0] * groups
        known = {*experts} & {*range(count)}
        for expert in known:
            by_group[expert * groups // count] += 1
        if len(known) != number or len(experts) != number:
            why = why or f"of block {block}, it names {[*experts]}, and not {number} of {count}"
        if len({*by_group}) > 1:
            more = f"more from some of the {groups} groups than from others"
            why = why or f"of block {block}, it takes {more}"
    if why:
        raise PlanError(
            f"The plan removes experts that {name} cannot do without: {why}.", hint="Search again."
        )
