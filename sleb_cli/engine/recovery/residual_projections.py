"""Find the modules of a block that add to the hidden states, and can take new weights.

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
        if self.norm is None:
            return [self.name]
        return [self.name, self.norm.name]

    def features(self, root: nn.Module, entering: Mapping[str, Tensor]) -> Tensor:
        """Return the factors of the module's weights, float32 [positions, in].

        For a gain, they are [positions, channels].

        Behind a norm, each position is divided by what the norm divides it by, without its gains.
        """
        states = entering[self.name]
        if self.kind == "gain":
            return self.normalized(root, states) * self.scale
        features = states.flatten(0, -2).float() * self.scale
        if self.norm is None:
            return features
        entering_norm = entering[self.norm.name]
        before = entering_norm.flatten(0, -2).float()
        after = self.norm.normalized(root, entering_norm)
        products = (before * after).sum(-1, keepdim=True)
        squares = after.square().sum(-1, keepdim=True)
        divisor = products / squares.clamp_min(1e-12)
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
            hook = module.register_forward_hook(partial(keep, name), with_kwargs=True)
            hooks.enter_context(hook)
        yield entering, leaving


def find_residual_projections(
    skippable: SkippableModel, call: Call, hidden: Tensor
) -> list[ResidualProjection]:
    """Return the block's residual projections, inexact ones first.

    `hidden` is [batch, positions, hidden size].

    All are matrices, but if none is exact, an exact gain may come last.
    """
    block = skippable.switches[call.block].block
    width = hidden.shape[-1]
    possible = possible_matrices(block, width)
    norms = possible_gains(block, width)
    adding = _that_add(skippable, call, hidden, [*possible, *norms])
    gains = []
    matrices = {}
    for projection in adding:
        if projection.kind == "gain":
            gains.append(projection)
        else:
            matrices[projection.name] = projection
    behind = _behind_norms(skippable, call, hidden, gains, possible)
    for projection in behind:
        matrices.pop(projection.name, None)
    projections = [*matrices.values(), *behind]
    projections.sort(key=lambda projection: projection.exact)
    if not any(projection.exact for projection in projections):
        exact_gains = [gain for gain in gains if gain.exact]
        projections += exact_gains[-1:]
    return projections


def _behind_norms(
    skippable: SkippableModel,
    call: Call,
    hidden: Tensor,
    norms: Sequence[ResidualProjection],
    matrices: Sequence[ResidualProjection],
) -> list[ResidualProjection]:
    """Return the matrices whose output one of these norms takes, each with its norm."""
    block = skippable.switches[call.block].block
    names = [projection.name for projection in (*norms, *matrices)]
    with captured(block, names) as (entering, leaving):
        skippable.run_block(call, hidden)
    projections = []
    for norm in norms:
        for matrix in matrices:
            output: Any = leaving.get(matrix.name)
            if not isinstance(output, Tensor) or output.numel() != hidden.numel():
                continue
            if torch.equal(output.flatten(), entering[norm.name].flatten()):
                behind = replace(
                    matrix, scale=norm.scale, exact=norm.exact, norm=norm, takes_bias=False
                )
                projections.append(behind)
    return projections


def final_norm(skippable: SkippableModel, hidden: Tensor, ids: Tensor) -> list[ResidualProjection]:
    """Return the norm, if any, that reads `hidden`, the last block's output.

    `hidden` is [batch, positions, hidden size].
    """
    hidden = hidden[:1, :FEW_POSITIONS]  # the logits of a batch may take gigabytes
    ids = ids[:1, :FEW_POSITIONS]
    norms = possible_gains(skippable.model, hidden.shape[-1])
    with captured(skippable.model, [norm.name for norm in norms]) as (entering, _):
        skippable.head(hidden, ids)
    for norm in norms:
        if norm.name in entering and torch.equal(entering[norm.name], hidden):
            return [norm]
    return []


def _that_add(
    skippable: SkippableModel,
    call: Call,
    hidden: Tensor,
    possible: Sequence[ResidualProjection],
) -> list[ResidualProjection]:
    """Return the modules whose output reaches the block's, times a constant."""
    block = skippable.switches[call.block].block
    plain = skippable.run_block(call, hidden).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(plain.device)
    size = plain.square().mean().sqrt()
    noise = noise * size * NOISE
    projections = []
    for projection in possible:
        noisy = _run_with_noise(skippable, call, hidden, projection.name, noise)
        if noisy is None:
            continue
        change = noisy - plain
        scale = float((change * noise).sum() / noise.square().sum())
        expected = max(abs(scale) * float(noise.norm()), 1e-12)
        missed = change - scale * noise
        error = float(missed.norm() / expected)
        if error > NEAR:
            continue
        offset = 0.0
        if projection.kind == "gain":
            offset = _offset_of(block, projection)
        exact = error <= EXACT
        projections.append(replace(projection, scale=scale, exact=exact, offset=offset))
    return projections


def _run_with_noise(
    skippable: SkippableModel, call: Call, hidden: Tensor, name: str, noise: Tensor
) -> Tensor | None:
    """Run a block with noise added to the output of a module.

    Returns None unless the module runs once and returns as many numbers.
    """
    fits: list[bool] = []

    def add_noise(module: nn.Module, args: Any, output: Any) -> Any:
        # Some families flatten sequences before their MLP: [batch * positions, hidden size].
        fits.append(isinstance(output, Tensor) and output.numel() == hidden.numel())
        if not fits[-1]:
            return output
        return output + noise.to(output.dtype).view_as(output)

    module = skippable.switches[call.block].block.get_submodule(name)
    with module.register_forward_hook(add_noise):
        noisy = skippable.run_block(call, hidden).float()
    return noisy if fits == [True] else None


def _offset_of(block: nn.Module, norm: ResidualProjection) -> float:
    module = block.get_submodule(norm.name)
    weight = module.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(weight), generator=generator).to(weight.device)
    without = _with_gain(module, 0.0, states)(states)
    alone = norm.normalized(block, states[None])[0]
    return float((without * alone).sum() / alone.square().sum())


def possible_matrices(root: nn.Module, width: int) -> list[ResidualProjection]:
    """Return the linear maps that might write hidden states of this width, by their shape."""
    matrices = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
            continue
        rows, columns = module.weight.shape
        has_bias = module.bias is not None
        if isinstance(module, Conv1D):
            if columns == width:
                matrices.append(ResidualProjection(name, "transposed", rows, has_bias))
        elif rows == width:
            matrices.append(ResidualProjection(name, "matrix", columns, has_bias))
    return matrices


def possible_gains(root: nn.Module, width: int) -> list[ResidualProjection]:
    """Return the norms of this width."""
    norms = []
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower()
        if is_norm and isinstance(weight, nn.Parameter) and weight.shape == (width,):
            norms.append(ResidualProjection(name, "gain", width, takes_bias=False))
    return norms
