"""Find the modules of a block that add to the hidden states, and can take new weights without
changing the family's code.

In most families, a block's output is its input plus the output of its last projection. Which module
that is, and whether there is one, is not looked up by name but tried: noise is added to a module's
output, and the module is a *residual projection* if the same noise, times a constant, comes out of
the block. If a norm is one (Gemma, OLMo 2, GLM-4), so is the projection whose output it normalizes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.transformers_internals import Conv1D

EXACT = 0.02
"""How far the response may be from a constant times the noise, as a share of it: the rounding of
bfloat16.
"""
NEAR = 3.0
"""Tolerance for a module whose output the rest of the block also reads; other modules are far
beyond.
"""
NOISE = 0.25
"""The noise relative to the hidden states: as little as rounding allows, since the response should
be linear.
"""
FEW_POSITIONS = 16
"""Enough to tell what enters a norm."""


@dataclass(frozen=True)
class ResidualProjection:
    """A module whose output is added to the hidden states, times `scale`.

    Attributes:
        name: the module's name in the block, or in the model for the final norm.
        kind: its weight is a matrix [out, in], a transposed one [in, out], or a gain for each
            channel, as in norms.
        inputs: the number of inputs or channels.
        exact: whether nothing else in the block reads its output.
        norm: the norm between its output and the hidden states, if there is one.
        offset: what a norm adds to its weight before it multiplies by it: 1 in Gemma, 0 elsewhere.
    """

    name: str
    kind: Literal["matrix", "transposed", "gain"]
    inputs: int
    takes_bias: bool
    scale: float = 1.0
    exact: bool = True
    norm: ResidualProjection | None = None
    offset: float = 0.0

    @property
    def names(self) -> list[str]:
        """The modules whose inputs `features` takes."""
        return [self.name, *(self.norm.names if self.norm else [])]

    def features(self, root: nn.Module, entering: Mapping[str, Tensor]) -> Tensor:
        """Return the factors of the module's weights, float32 [positions, in] (gain: [positions,
        channels]).

        Behind a norm, each position is divided by what the norm divides it by, without its gains.
        """
        states = entering[self.name]
        if self.kind == "gain":
            return self.normalized(root, states) * self.scale
        features = states.flatten(0, -2).float() * self.scale
        if self.norm is None:
            return features
        before = entering[self.norm.name].flatten(0, -2).float()
        after = self.norm.normalized(root, entering[self.norm.name])
        squares = after.square().sum(-1, keepdim=True).clamp_min(1e-12)
        divisor = (before * after).sum(-1, keepdim=True) / squares
        return features / divisor.clamp_min(1e-12)

    def normalized(self, root: nn.Module, entering: Tensor) -> Tensor:
        """Return the normalized states, before the norm's gains, float32 [positions, channels]."""
        # A norm may add an offset to its gains, which the difference cancels out.
        states = entering.float()
        norm = root.get_submodule(self.name)
        on: Tensor = _with_gain(norm, 1.0, states)(states)
        off: Tensor = _with_gain(norm, 0.0, states)(states)
        return (on - off).flatten(0, -2)


def _with_gain(norm: nn.Module, gain: float, like: Tensor) -> nn.Module:
    # The norm's own weights may be away, so a copy gets others, in float32.
    copied = copy.copy(norm)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in norm.named_parameters(recurse=False):
        value = gain if name == "weight" else 0.0
        filled = like.new_full(parameter.shape, value)
        parameters[name] = nn.Parameter(filled, requires_grad=False)
    vars(copied)["_parameters"] = parameters
    for name in ("forward", "_old_forward", "_hf_hook"):  # with which accelerate moves its weights
        vars(copied).pop(name, None)
    return copied


@contextmanager
def captured(
    root: nn.Module, names: Iterable[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Collect the inputs and the outputs of these modules, by name, while the context is open."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Any] = {}

    def keep(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        entering[name] = args[0] if args else next(iter(kwargs.values()))
        leaving[name] = output

    with ExitStack() as hooks:
        for name in names:
            module = root.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
        yield entering, leaving


def find_residual_projections(
    skippable: SkippableModel, call: Call, hidden: Tensor
) -> list[ResidualProjection]:
    """Return the block's residual projections, inexact ones first, given hidden states [batch,
    positions, hidden size].

    All are matrices, but if none is exact, an exact gain may come last.
    """
    candidates = _candidates(skippable, call, hidden)
    gains = [projection for projection in candidates if projection.kind == "gain"]
    behind = _behind_norms(skippable, call, hidden, gains)
    others = {projection.name for projection in [*gains, *behind]}
    matrices = [projection for projection in candidates if projection.name not in others]
    matrices += behind
    matrices.sort(key=lambda projection: projection.exact)
    if any(projection.exact for projection in matrices):
        return matrices
    exact_gains = [projection for projection in gains if projection.exact]
    return [*matrices, *exact_gains[-1:]]


def _behind_norms(
    skippable: SkippableModel, call: Call, hidden: Tensor, norms: Sequence[ResidualProjection]
) -> list[ResidualProjection]:
    block = skippable.switches[call.block].block
    possible = possible_projections(block, hidden.shape[-1])
    matrices = [projection for projection in possible if projection.kind != "gain"]
    names = [projection.name for projection in (*norms, *matrices)]
    with captured(block, names) as (entering, leaving):
        skippable.run_block(call, hidden)
    found = []
    for norm in norms:
        for matrix in matrices:
            output: Any = leaving.get(matrix.name)
            if not isinstance(output, Tensor) or output.numel() != hidden.numel():
                continue
            if torch.equal(output.flatten(), entering[norm.name].flatten()):
                behind = replace(
                    matrix, scale=norm.scale, exact=norm.exact, norm=norm, takes_bias=False
                )
                found.append(behind)
    return found


def final_norm(skippable: SkippableModel, hidden: Tensor, ids: Tensor) -> list[ResidualProjection]:
    """Return the norm, if any, that reads `hidden`, the last block's output [batch, positions,
    hidden size].
    """
    hidden = hidden[:1, :FEW_POSITIONS]  # the logits of a batch may take gigabytes
    ids = ids[:1, :FEW_POSITIONS]
    possible = possible_projections(skippable.model, hidden.shape[-1])
    norms = [projection for projection in possible if projection.kind == "gain"]
    with captured(skippable.model, [norm.name for norm in norms]) as (entering, _):
        skippable.head(hidden, ids)
    for norm in norms:
        if norm.name in entering and torch.equal(entering[norm.name], hidden):
            return [norm]
    return []


def _candidates(skippable: SkippableModel, call: Call, hidden: Tensor) -> list[ResidualProjection]:
    block = skippable.switches[call.block].block
    plain = skippable.run_block(call, hidden).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(plain.device)
    noise = noise * plain.square().mean().sqrt() * NOISE
    found = []
    for projection in possible_projections(block, hidden.shape[-1]):
        noisy = _run_with_noise(skippable, call, hidden, projection.name, noise)
        if noisy is None:
            continue
        change = noisy - plain
        scale = float((change * noise).sum() / noise.square().sum())
        expected = max(abs(scale) * float(noise.norm()), 1e-12)
        error = float((change - scale * noise).norm() / expected)
        if error <= NEAR:
            offset = _offset_of(block, projection) if projection.kind == "gain" else 0.0
            exact = error <= EXACT
            found.append(replace(projection, scale=scale, exact=exact, offset=offset))
    return found


def _run_with_noise(
    skippable: SkippableModel, call: Call, hidden: Tensor, name: str, noise: Tensor
) -> Tensor | None:
    """Run a block with noise added to the output of a module, or return None unless the module
    runs once and returns as many numbers.
    """
    fits: list[bool] = []

    def add_noise(module: nn.Module, args: Any, output: Any) -> Any:
        # Some families flatten sequences before their MLP: [batch * positions, hidden size].
        fits.append(isinstance(output, Tensor) and output.numel() == hidden.numel())
        return output + noise.to(output.dtype).view_as(output) if fits[-1] else output

    module = skippable.switches[call.block].block.get_submodule(name)
    with module.register_forward_hook(add_noise):
        noisy = skippable.run_block(call, hidden).float()
    return noisy if fits == [True] else None


def _offset_of(block: nn.Module, norm: ResidualProjection) -> float:
    module = block.get_submodule(norm.name)
    weight = module.get_parameter("weight")
    states = torch.randn(len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    without = _with_gain(module, 0.0, states)(states)
    alone = norm.normalized(block, states[None])[0]
    return float((without * alone).sum() / alone.square().sum())


def possible_projections(root: nn.Module, width: int) -> list[ResidualProjection]:
    """Return the modules that might write hidden states of this width, judged by their shape."""
    found = []
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            continue
        has_bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear) and weight.shape[0] == width:
            found.append(ResidualProjection(name, "matrix", weight.shape[1], has_bias))
        elif isinstance(module, Conv1D) and weight.shape[1] == width:
            found.append(ResidualProjection(name, "transposed", weight.shape[0], has_bias))
        elif weight.shape == (width,) and "norm" in type(module).__name__.lower():
            found.append(ResidualProjection(name, "gain", width, takes_bias=False))
    return found
