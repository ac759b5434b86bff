"""What others published to recover a model without blocks, and bounds that no engine loads, to compare recovery with.

Each is a function from a `Site`, the block before a gap, to a `Patch`; `fit_gaps` goes through all gaps, on the model
as patched so far. Their authors fit to the dense model's own states, which knows nothing of what earlier gaps left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.recovery.least_squares import Ridge

RIDGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Source = tuple[str, str]
"""What a fit reads of a block: ("input", module), ("output", module), or this."""
LEAVING = ("leaving", "")


@dataclass(frozen=True)
class Added:
    """A linear function of what a block computes, added to the states that leave it.

    `coefficients` are float32 [features of the source, hidden size].
    """

    source: Source
    coefficients: Tensor


@dataclass(frozen=True)
class Patch:
    """New values by parameter name, which every engine loads, and what is added behind blocks, which none does."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[int, Added] = field(default_factory=dict)

    def __or__(self, other: Patch) -> Patch:
        return Patch({**self.values, **other.values}, {**self.added, **other.added})


def final_states(skippable: SkippableModel, removed: Collection[int], patch: Patch, ids: Tensor) -> Tensor:
    """Return what leaves the last block of the patched model."""
    calls = skippable.calls(ids)
    states = calls[0].entering
    with skippable.replaced(patch.values):
        for call in calls:
            states = states if call.block in removed else leave(skippable, patch, call, states)
    return states


def leave(skippable: SkippableModel, patch: Patch, call: Call, states: Tensor) -> Tensor:
    """Return what leaves a block of the patched model, whose values are in place."""
    if call.block not in patch.added:
        return skippable.run_block(call, states)
    added = patch.added[call.block]
    leaving, features = observe(skippable, call, states, added.source)
    return (leaving.float() + features @ added.coefficients).to(leaving.dtype)


def observe(skippable: SkippableModel, call: Call, states: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Run a block; return what leaves it, and the source, float32 [batch, positions, features]."""
    kind, name = source
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.update({"input": args[0] if args else output, "output": output})

    handle = skippable.switches[call.block].block.get_submodule(name).register_forward_hook(keep)
    found["leaving"] = leaving = skippable.run_block(call, states)
    handle.remove()
    return leaving, found[kind].float().view(*leaving.shape[:2], -1)


class FittingText:
    """The text to fit on and the text that decides, in batches, and the dense states that enter each depth."""

    def __init__(self, skippable: SkippableModel, train: Tensor, validation: Tensor, batch: int) -> None:
        self.skippable, self.train_ids, self.validation_ids = skippable, train, validation
        ids = [*torch.split(train, batch), *torch.split(validation, batch)]
        fitted = -(-len(train) // batch)
        self.train, self.validation = range(fitted), range(fitted, len(ids))
        start = time.monotonic()
        self.calls = [skippable.calls(each) for each in ids]
        self.dense = [[calls[0].entering for calls in self.calls]]
        for block in range(len(skippable.switches)):
            states = zip(self.calls, self.dense[-1], strict=True)
            self.dense.append([skippable.run_block(calls[block], entering) for calls, entering in states])
        self.seconds = time.monotonic() - start


@dataclass(frozen=True)
class Site:
    """A block of the patched model to fit something behind: what enters it, and what should leave it."""

    text: FittingText
    block: int
    entering: Sequence[Tensor]
    wanted: Sequence[Tensor]

    def rows(self, batches: range, source: Source = LEAVING) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what leaves the block, what should, and the source, float64 [batch, positions, ...]."""
        for batch in batches:
            call = self.text.calls[batch][self.block]
            leaving, features = observe(self.text.skippable, call, self.entering[batch], source)
            yield leaving.double(), self.wanted[batch].double(), features.double()

    def least_squares(self, source: Source, *, published: bool = False) -> Tensor:
        """Return the coefficients, float64, with which the source comes closest to what is missing.

        Positions count by the size of their states, and the ridge is the best on the validation text: that is ours. In
        what others published, all positions count alike, and there is no ridge.
        """
        found: list[Ridge] = []
        for batches in (self.text.train, self.text.validation):
            sums = None
            for leaving, wanted, features in self.rows(batches, source):
                sums = sums or Ridge(features.shape[-1], wanted.shape[-1], wanted.device)
                size = torch.ones_like(wanted[..., 0]) if published else wanted.square().mean(-1).clamp_min(1e-12)
                sums.add(features.flatten(0, 1), (wanted - leaving).flatten(0, 1), 1 / size.flatten())
            found += [sums] if sums else []
        train, validation = found
        return train.solve(0.0) if published else min(map(train.solve, RIDGES), key=validation.error)

    @property
    def module(self) -> nn.Module:
        """The block."""
        return self.text.skippable.switches[self.block].block

    @property
    def writers(self) -> list[str]:
        """The block's linear layers that write hidden states, such as self_attn.o_proj and mlp.down_proj."""
        width, modules = self.wanted[0].shape[-1], self.module.named_modules()
        return [name for name, module in modules if isinstance(module, nn.Linear) and module.out_features == width]

    @cached_property
    def last(self) -> str:
        """The module that the block calls last, whose output it adds to the states: of the MLP, or a norm behind it."""
        called: list[str] = []
        leaves = [(name, module) for name, module in self.module.named_modules() if not any(module.children())]
        handles = [leaf.register_forward_hook(lambda *_, name=name: called.append(name)) for name, leaf in leaves]
        self.text.skippable.run_block(self.text.calls[0][self.block], self.entering[0])
        for handle in handles:
            handle.remove()
        return called[-1]

    def behind(self, coefficients: Tensor, source: Source) -> Patch:
        """Return the patch that adds this function of the source to what leaves the block."""
        return Patch(added={self.block: Added(source, coefficients.float())})

    def merged(self, name: str, change: Callable[[Tensor], Tensor]) -> Patch:
        """Return the patch that changes a linear layer's weight: summed in float64, rounded as the model is."""
        weight = self.module.get_submodule(name).weight
        own = next(full for full, other in self.text.skippable.model.named_parameters() if other is weight)
        return Patch(values={own: (weight.double() + change(weight.double())).to(weight.dtype)})


class Unavailable(Exception):
    """The method does not exist for this model."""


Fit = Callable[[Site], Patch]


def linear_patch(site: Site) -> Patch:
    """LinearPatch (Chen et al., arXiv 2505.24680): the states times H diag(d) H', without its optional training.

    d is by how much the mean size of a channel of the rotated states grows over the gap, averaged over sequences.
    """
    rotation = hadamard(site.wanted[0].shape[-1]).to(site.wanted[0].device)
    rows = site.rows(site.text.train)
    sizes = [[(states @ rotation).abs().mean(1) for states in (wanted, leaving)] for leaving, wanted, _ in rows]
    scale = torch.cat([wanted / leaving for wanted, leaving in sizes]).mean(0)
    return site.behind((rotation * (scale - 1)) @ rotation.T, LEAVING)


def replace_me(site: Site) -> Patch:
    """ReplaceMe by least squares (Shopkhoev et al., arXiv 2505.02819): what the MLP adds, times T.

    T is merged into the MLP's last weights; where a norm follows them, it cannot be, and T comes behind the norm.
    """
    source = ("output", site.last)
    change = site.least_squares(source, published=True)
    if site.last in site.writers:
        return site.merged(site.last, lambda weight: change.T @ weight)
    return site.behind(change, source)


def down_proj(site: Site) -> Patch:
    """The MLP's last weights alone."""
    if site.last not in site.writers:
        raise Unavailable(f"{site.last} follows the MLP")
    change = site.least_squares(("input", site.last))
    return site.merged(site.last, lambda weight: change.T)


def ghosted(site: Site) -> Patch:
    """Ghosted Layers (Yun et al., arXiv 2605.15491): the states times any matrix."""
    return site.behind(site.least_squares(LEAVING, published=True), LEAVING)


def fit_gaps(text: FittingText, removed: Collection[int], fit: Fit) -> Patch:
    """Fit the block before each gap to the dense states at the gap's end."""
    count = len(text.skippable.switches)
    kept = [block for block in range(count) if block not in removed]
    before = [block for block in kept if block < min(removed)]
    if not before:
        raise Unavailable("no block stays before the first gap")
    patch, states = Patch(), text.dense[before[-1]]
    for block, end in pairwise([*kept[len(before) - 1 :], count]):
        with text.skippable.replaced(patch.values):
            if end > block + 1:
                patch |= fit(Site(text, block, states, text.dense[end]))
        if end > max(removed):
            break
        with text.skippable.replaced(patch.values):
            batches = zip(text.calls, states, strict=True)
            states = [leave(text.skippable, patch, calls[block], entering) for calls, entering in batches]
    return patch


def hadamard(size: int) -> Tensor:
    """Return a normalized Hadamard matrix, float64; where there is none here, a random rotation."""
    signs = _signs(size)
    if signs is not None:
        return signs.double() / math.sqrt(size)
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]


def _signs(size: int) -> Tensor | None:
    """Return a matrix of 1 and -1 with orthogonal rows: Sylvester's, or Paley's first, or their Kronecker product."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.long)
    if size % 2 == 0 and (half := _signs(size // 2)) is not None:
        return torch.kron(torch.tensor([[1, 1], [1, -1]]), half)
    prime = size - 1
    if size % 4 or any(prime % factor == 0 for factor in range(2, math.isqrt(prime) + 1)):
        return None
    squares = {number * number % prime for number in range(1, prime)}
    legendre = torch.tensor([0, *(1 if number in squares else -1 for number in range(1, prime))])
    numbers = torch.arange(prime)
    skew = torch.zeros(size, size, dtype=torch.long)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, legendre[(numbers[:, None] - numbers) % prime]
    return skew + torch.eye(size, dtype=torch.long)
