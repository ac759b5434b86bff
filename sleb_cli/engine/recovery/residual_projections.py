"""The modules of a block that add to the hidden states, and can take new weights without changing the family's code.

In most families, a block's output is its input plus the output of its last projection. Which module that is, and
whether there is one, is not looked up by name but tried: noise is added to a module's output, and the module is a
*residual projection* if the same noise, times a constant, comes out of the block.
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
from sleb_cli.engine.third_party import our_code

EXACT = 0.02
"""How far what comes out may be from a constant times the noise, as a share of it: the rounding of bfloat16."""
NEAR = 3.0
"""The same if the rest of the block reads the module's output; other modules are far beyond."""
# The noise relative to the hidden states: as little as rounding allows, since the response should be linear.
NOISE = 0.25


@dataclass(frozen=True)
class ResidualProjection:
    """A module whose output is added to the hidden states.

    Attributes:
        name: the module's name in the block.
        module: the module.
        kind: its weight is a matrix [out, in], a transposed one [in, out], or a gain for each channel, as in norms.
        scale: which multiple of its output is added.
        exact: whether nothing else in the block reads its output.
    """

    name: str
    module: nn.Module
    kind: Literal["matrix", "transposed", "gain"]
    scale: float
    exact: bool

    @property
    def has_bias(self) -> bool:
        """Whether a constant can be fitted, too."""
        return getattr(self.module, "bias", None) is not None

    def features(self, entering: Tensor) -> Tensor:
        """Return what the module's weights are multiplied by, float32 [positions, in] (gain: [positions, channels])."""
        if self.kind != "gain":
            return entering.flatten(0, -2).float() * self.scale
        states = entering.float()
        on: Tensor = self._norm(1.0, states)(states)
        off: Tensor = self._norm(0.0, states)(states)
        return (on - off).flatten(0, -2) * self.scale

    def _norm(self, gain: float, like: Tensor) -> nn.Module:
        """Return the norm in float32 with this gain everywhere; its own weights, which may be away, are not used."""
        norm = copy.copy(self.module)
        vars(norm)["_parameters"] = {
            name: nn.Parameter(like.new_full(own.shape, gain if name == "weight" else 0.0), requires_grad=False)
            for name, own in self.module.named_parameters(recurse=False)
        }
        for name in ("forward", "_old_forward", "_hf_hook"):  # with which accelerate moves its weights
            vars(norm).pop(name, None)
        return norm


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what enters these modules while the context is open."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with our_code():
            found[module] = args[0] if args else next(iter(kwargs.values()))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_residual_projections(skippable: SkippableModel, call: Call, hidden: Tensor) -> list[list[ResidualProjection]]:
    """Return the block's residual projections, in the order of fitting; `hidden` is [batch, positions, hidden size].

    Those that are fitted together are one list. First come, one by one, matrices whose output the rest of the block
    reads (attention's, which the MLP reads), fitted as though it did not. Then come the exact ones together (attention
    and MLP in parallel are two), which make up for it. If no matrix is exact, an exact gain is fitted, or nothing.
    """
    found = list(_candidates(skippable, call, hidden))
    near = [[projection] for projection in found if not projection.exact and projection.kind != "gain"]
    exact = [projection for projection in found if projection.exact and projection.kind != "gain"]
    gains = [projection for projection in found if projection.exact and projection.kind == "gain"][-1:]
    return [*near, *([exact or gains] if exact or gains else [])]


def final_norm(skippable: SkippableModel, hidden: Tensor, ids: Tensor) -> ResidualProjection | None:
    """Return the norm whose input is what leaves the last block, [batch, positions, hidden size], or None."""
    norms = [
        (name, module) for name, module in skippable.model.named_modules() if _kind(module, hidden.shape[-1]) == "gain"
    ]
    with inputs_of([module for _, module in norms]) as entering:
        skippable.head(hidden, ids)
    for name, module in norms:
        if module in entering and torch.equal(entering[module], hidden):
            return ResidualProjection(name, module, "gain", 1.0, exact=True)
    return None


def _candidates(skippable: SkippableModel, call: Call, hidden: Tensor) -> Iterator[ResidualProjection]:
    block = skippable.switches[call.block].block
    plain = skippable.run_block(call, hidden).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(plain.device) * plain.square().mean().sqrt() * NOISE
    for name, module in block.named_modules():
        kind = _kind(module, hidden.shape[-1])
        if kind is None:
            continue
        fits: list[bool] = []

        def add_noise(module: nn.Module, args: Any, output: Any, fits: list[bool] = fits) -> Any:
            # Some families flatten sequences before their MLP: [batch x positions, hidden size].
            with our_code():
                fits.append(isinstance(output, Tensor) and output.numel() == hidden.numel())
                return output + noise.to(output.dtype).view_as(output) if fits[-1] else output

        handle = module.register_forward_hook(add_noise)
        try:
            change = skippable.run_block(call, hidden).float() - plain
        finally:
            handle.remove()
        if fits != [True]:
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
