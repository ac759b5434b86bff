"""The modules of a block that write to the hidden states: what can be given new values with the family's code as it is.

A block ends as `hidden states + what its last projection says`, or so in most families; which module that is, and
whether it is so at all, is not looked up by name but tried: something is added to a module's output, and a *writer* is
one where the same, times a constant, comes out of the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sleb_cli.engine.forward.skipping import Call, SkippableModel

EXACT = 0.02
"""How much may be otherwise than a constant times what was added, as a share of it: rounding of bfloat16."""
NEAR = 3.0
"""The same where the rest of the block answers to what was added; what does not write to the states is far beyond."""
# What is added, relative to the hidden states: as little as rounding allows, since the answer should be in proportion.
ADDED = 0.25


@dataclass(frozen=True)
class ResidualProjection:
    """A module whose output is added to the hidden states.

    Attributes:
        name: its name in the block.
        module: itself.
        kind: a matrix, [out, in] or, transposed, [in, out], or a gain for each channel, as norms have.
        scale: which multiple of its output is added.
        exact: whether nothing else in the block answers to its output.
    """

    name: str
    module: nn.Module
    kind: Literal["matrix", "transposed", "gain"]
    scale: float
    exact: bool

    @property
    def has_bias(self) -> bool:
        """Whether a constant can be added, too."""
        return getattr(self.module, "bias", None) is not None

    def features(self, entering: Tensor) -> Tensor:
        """Give what the module's weights are multiplied with, float32 [positions, in] (gain: [positions, channels])."""
        if self.kind != "gain":
            return entering.flatten(0, -2).float() * self.scale
        on: Tensor = self._norm(1.0)(entering.float())
        off: Tensor = self._norm(0.0)(entering.float())
        return (on - off).flatten(0, -2) * self.scale

    def _norm(self, gain: float) -> nn.Module:
        norm = copy.deepcopy(self.module).float()
        norm.get_parameter("weight").data.fill_(gain)
        return norm


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what enters these modules when they are called next."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module] = args[0] if args else next(iter(kwargs.values()))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_residual_projections(skippable: SkippableModel, call: Call, hidden: Tensor) -> list[list[ResidualProjection]]:
    """Give the block's writers on these hidden states, [batch, positions, hidden size], in the order to fit them.

    Those that are fitted together make one list. First come matrices to whose output the rest of the block answers
    (attention's, to which the MLP does), as though it did not; then, together, those that are exact (attention and MLP
    in parallel are two), which makes up for it. Where no matrix is exact, a gain is, or nothing.
    """
    found = list(_tried(skippable, call, hidden))
    near = [[projection] for projection in found if not projection.exact and projection.kind != "gain"]
    exact = [projection for projection in found if projection.exact and projection.kind != "gain"]
    gains = [projection for projection in found if projection.exact and projection.kind == "gain"][-1:]
    return [*near, *([exact or gains] if exact or gains else [])]


def final_norm(skippable: SkippableModel, hidden: Tensor, ids: Tensor) -> ResidualProjection | None:
    """Give the norm that takes what leaves the last block, [batch, positions, hidden size], where there is one."""
    norms = [
        (name, module) for name, module in skippable.model.named_modules() if _kind(module, hidden.shape[-1]) == "gain"
    ]
    with inputs_of([module for _, module in norms]) as entering:
        skippable.head(hidden, ids)
    for name, module in norms:
        if module in entering and torch.equal(entering[module], hidden):
            return ResidualProjection(name, module, "gain", 1.0, exact=True)
    return None


def _tried(skippable: SkippableModel, call: Call, hidden: Tensor) -> Iterator[ResidualProjection]:
    block = skippable.switches[call.block].block
    plain = skippable.run_block(call, hidden).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(plain.device) * plain.square().mean().sqrt() * ADDED
    for name, module in block.named_modules():
        kind = _kind(module, hidden.shape[-1])
        if kind is None:
            continue
        fitting: list[bool] = []

        def add(module: nn.Module, args: Any, output: Any, fitting: list[bool] = fitting) -> Any:
            # Some families join sequences before their MLP: [batch x positions, hidden size].
            fitting.append(isinstance(output, Tensor) and output.numel() == hidden.numel())
            return output + noise.to(output.dtype).view_as(output) if fitting[-1] else output

        handle = module.register_forward_hook(add)
        try:
            change = skippable.run_block(call, hidden).float() - plain
        finally:
            handle.remove()
        if fitting != [True]:
            continue
        scale = float((change * noise).sum() / noise.square().sum())
        error = float((change - scale * noise).norm() / max(abs(scale) * float(noise.norm()), 1e-12))
        if error <= NEAR:
            yield ResidualProjection(name, module, kind, scale, exact=error <= EXACT)


def _kind(module: nn.Module, width: int) -> Literal["matrix", "transposed", "gain"] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return "matrix" if weight.shape[0] == width else None
    if isinstance(module, Conv1D):
        return "transposed" if weight.shape[1] == width else None
    return "gain" if weight.shape == (width,) and "norm" in type(module).__name__.lower() else None
