"""The modules of a block that add to the hidden states, and can take new weights without changing the family's code.

In most families, a block's output is its input plus the output of its last projection. Which module that is, and
whether there is one, is not looked up by name but tried: noise is added to a module's output, and the module is a
*residual projection* if the same noise, times a constant, comes out of the block. If a norm is one (Gemma, OLMo 2,
GLM-4), so is the projection whose output it normalizes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
        norm: the norm that its output goes through before it is added; None if it is added as it is.
        offset: what a norm adds to its weight before it multiplies by it: 1 in Gemma, 0 elsewhere.
    """

    name: str
    module: nn.Module
    kind: Literal["matrix", "transposed", "gain"]
    scale: float
    exact: bool
    norm: ResidualProjection | None = None
    offset: float = 0.0

    @property
    def takes_bias(self) -> bool:
        """Whether a constant can be fitted, too."""
        return self.kind != "gain" and self.norm is None and getattr(self.module, "bias", None) is not None

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose inputs `features` needs."""
        return [self.module, *(self.norm.modules if self.norm else [])]

    def features(self, entering: Mapping[nn.Module, Tensor]) -> Tensor:
        """Return what the module's weights are multiplied by, float32 [positions, in] (gain: [positions, channels]).

        Behind a norm, each position is divided by what the norm divides it by, and its gains are left out.
        """
        states = entering[self.module]
        if self.kind == "gain":
            return self.normalized(states) * self.scale
        features = states.flatten(0, -2).float() * self.scale
        if self.norm is None:
            return features
        before = entering[self.norm.module].flatten(0, -2).float()
        after = self.norm.normalized(entering[self.norm.module])
        divisor = (before * after).sum(-1, keepdim=True) / after.square().sum(-1, keepdim=True).clamp_min(1e-12)
        return features / divisor.clamp_min(1e-12)

    def normalized(self, entering: Tensor) -> Tensor:
        """Return what the norm multiplies by its gains, float32 [positions, channels]."""
        states = entering.float()
        on: Tensor = self._norm(1.0, states)(states)
        off: Tensor = self._norm(0.0, states)(states)
        return (on - off).flatten(0, -2)

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


def find_residual_projections(skippable: SkippableModel, call: Call, hidden: Tensor) -> list[ResidualProjection]:
    """Return the block's residual projections; `hidden` is [batch, positions, hidden size].

    They are matrices, those that are not exact first. If no matrix is exact, an exact gain comes last, if there is one.
    """
    found = list(_candidates(skippable, call, hidden))
    gains = [projection for projection in found if projection.kind == "gain"]
    behind = list(_behind_norms(skippable, call, hidden, gains))
    normalized = [projection.module for projection in behind]
    matrices = [projection for projection in found if projection not in gains and projection.module not in normalized]
    matrices = sorted([*matrices, *behind], key=lambda projection: projection.exact)
    exact_gains = [projection for projection in gains if projection.exact]
    return matrices if any(projection.exact for projection in matrices) else [*matrices, *exact_gains[-1:]]


def _behind_norms(
    skippable: SkippableModel, call: Call, hidden: Tensor, norms: Sequence[ResidualProjection]
) -> Iterator[ResidualProjection]:
    """Yield the matrices whose output is all that enters one of these norms, in the order of the norms."""
    block = skippable.switches[call.block].block
    leaving: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        with our_code():
            if isinstance(output, Tensor):
                leaving[name] = output

    matrices = {
        name: (module, kind)
        for name, module in block.named_modules()
        if (kind := _kind(module, hidden.shape[-1])) not in (None, "gain")
    }
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, (module, _) in matrices.items()
    ]
    try:
        with inputs_of([norm.module for norm in norms]) as entering:
            skippable.run_block(call, hidden)
    finally:
        for handle in handles:
            handle.remove()
    for norm in norms:
        for name, output in leaving.items():
            if output.numel() == hidden.numel() and torch.equal(output.flatten(), entering[norm.module].flatten()):
                module, kind = matrices[name]
                yield ResidualProjection(name, module, kind, norm.scale, norm.exact, norm)


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
            yield _with_offset(ResidualProjection(name, module, kind, scale, exact=error <= EXACT))


def _with_offset(projection: ResidualProjection) -> ResidualProjection:
    """Return a norm with its offset, and anything else as it is."""
    if projection.kind != "gain":
        return projection
    weight = projection.module.get_parameter("weight")
    states = torch.randn(len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    norm = projection._norm
    without, alone = norm(0.0, states)(states), projection.normalized(states[None])[0]
    return replace(projection, offset=float((without * alone).sum() / alone.square().sum()))


def _kind(module: nn.Module, width: int) -> Literal["matrix", "transposed", "gain"] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return "matrix" if weight.shape[0] == width else None
    if isinstance(module, Conv1D):
        return "transposed" if weight.shape[1] == width else None
    return "gain" if weight.shape == (width,) and "norm" in type(module).__name__.lower() else None
