"""Run a model as if some experts could not be chosen, and watch its routers choose.

No family's code is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sleb_cli.engine.model.experts import Experts
from sleb_plugins import UnsupportedModelError

Forward = Callable[..., Any]


@contextmanager
def without_experts(
    experts: Experts,
    blocks: Sequence[nn.Module],
    removed: Mapping[int, Sequence[int]],
    model_type: str,
) -> Iterator[None]:
    """Have no router choose these experts, by block: their logits and biases are -inf.

    Raises:
        UnsupportedModelError: at the end, if a block has run and its router was not reached.
    """
    masks: dict[int, list[_Mask]] = {}
    with ExitStack() as stack:
        for block in experts.blocks:
            if removed.get(block):
                masks[block] = _masks_of(experts, blocks[block], removed[block])
                for mask in masks[block]:
                    stack.enter_context(_wrapped_forward(mask.module, mask.run))
        yield
    for block, in_block in masks.items():
        if any(mode.runs for mode in in_block) and not any(mode.hits for mode in in_block):
            raise UnsupportedModelError(
                f"The experts of {model_type} cannot be left out: sleb does not reach the router "
                f"of block {block}.",
                hint="Open an issue that names this family.",
            )


def _masks_of(experts: Experts, block: nn.Module, removed: Sequence[int]) -> list[_Mask]:
    """Return a mask for each child of a block that has tensors of the router."""
    children: dict[str, dict[str, int]] = {}
    for name, part in experts.router.items():
        child, _, inner = name.partition(".")
        children.setdefault(child, {})[inner] = part.axis
    numbers = torch.tensor(sorted(removed))
    return [
        _Mask(block.get_submodule(child), children[child], numbers) for child in sorted(children)
    ]


class _Mask(TorchFunctionMode):
    """Puts -inf on the last axis of what is computed with a router's weights, or a cast or view.

    Biases of the choice, by expert, also get -inf. In a scale by expert, these entries are never
    read. A mode, and not new weights: they may come from the disk just before the router runs.
    """

    def __init__(self, module: nn.Module, axes: Mapping[str, int], removed: Tensor) -> None:
        """Take the axis of the experts in each tensor of the router, by its name in the module."""
        super().__init__()
        self.module = module
        self.removed = removed
        self.runs = 0
        self.hits = 0
        self._owners = []
        for name, axis in axes.items():
            owner, _, last = name.rpartition(".")
            self._owners.append((module.get_submodule(owner), last, axis))
        self._copies: list[Tensor] = []
        """Casts and views of the router's weights, made in this run."""

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own `forward`, masked."""
        self.runs += 1
        try:
            with self:
                return forward(*args, **kwargs)
        finally:
            self._copies.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        has_weights = any(self._is_weight(tensor) for tensor in tensors)
        masked_args = [self._masked_list(value) for value in args]
        masked_kwargs = {name: self._masked_list(value) for name, value in kwargs.items()}
        output = func(*masked_args, **masked_kwargs)
        if not has_weights or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if len(tensors) == 1:  # a cast or view of the weights; a product with hidden states has two
            self._copies.append(output)
            return output
        self.hits += 1
        return self._masked(output, -1)

    def _axis(self, value: Any) -> int | None:
        """Return the axis of the experts in a tensor of the router; None for any other value."""
        for owner, name, axis in self._owners:
            if getattr(owner, name) is value:
                return axis
        return None

    def _is_weight(self, tensor: Tensor) -> bool:
        if any(copy is tensor for copy in self._copies):
            return True
        axis = self._axis(tensor)
        return axis is not None and tensor.numel() > tensor.shape[axis]

    def _masked_list(self, value: Any) -> Any:
        """Mask a list with a number for each expert; return any other value as it is."""
        axis = self._axis(value)
        if axis is None or value.numel() > value.shape[axis]:
            return value
        return self._masked(value, axis)

    def _masked(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.index_fill(axis, self.removed.to(tensor.device), float("-inf"))


class TiesByNumber(TorchFunctionMode):
    """Has `topk` take the lower of equals, so that a model and its cut choose alike.

    A cut keeps the order of the experts.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk):
            func = _topk
        return func(*args, **(kwargs or {}))


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """`torch.topk`, with the lower of equals first."""
    # torch.topk takes any of them, by how many there are; in bfloat16, a router's logits are often
    # equal.
    values, indices = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


@dataclass(frozen=True)
class Routing:
    """The experts that a block's router chose for some tokens.

    Attributes:
        hidden: the experts' inputs, [tokens, width].
        experts: their numbers, int64 [tokens, active]; numbers from the count on are experts that
            compute nothing.
        gates: the weight of each, [tokens, active].
        run_alone: given other inputs, [tokens, width], and one expert for each, [tokens], returns
            its outputs by a gate of 1.
    """

    hidden: Tensor
    experts: Tensor
    gates: Tensor
    run_alone: Callable[[Tensor, Tensor], Tensor]


@contextmanager
def watch_routing(
    experts: Experts, blocks: Sequence[nn.Module], listen: Callable[[int, Routing], object]
) -> Iterator[None]:
    """Call `listen` with each block's number and routing; the model computes as before."""
    with ExitStack() as stack:
        for block in experts.blocks:
            # The experts are called through the module with their weights, or one around it.
            path = experts.module
            while path:
                module = blocks[block].get_submodule(path)
                count = experts.count if path == experts.module else None
                watch = partial(_run_and_report, partial(listen, block), count)
                stack.enter_context(_wrapped_forward(module, watch))
                path = path.rpartition(".")[0]
        yield


def _run_and_report(
    listen: Callable[[Routing], object],
    count: int | None,
    forward: Forward,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a module's own `forward`, and report its routing, if it is given one.

    `count` is the number of experts if the module holds their weights, so that it may be given all
    tokens for each expert.
    """
    output = forward(*args, **kwargs)
    hidden, *others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    routing = _routing_of_tokens(forward, hidden, others)
    if routing is None and count is not None and not others:
        routing = _routing_of_all(forward, hidden, count, output)
    if routing is not None:
        listen(routing)
    return output


def _routing_of_tokens(
    forward: Forward, hidden: Tensor, others: Sequence[Tensor]
) -> Routing | None:
    """Read a call that is given the experts of each token and their gates, which differ in type."""
    numbers = next(
        (tensor for tensor in others if tensor.dtype in (torch.int64, torch.int32)), None
    )
    if numbers is None or numbers.ndim < 2:
        return None
    gates = None
    for tensor in others:
        if gates is None and tensor.is_floating_point() and tensor.shape == numbers.shape:
            gates = tensor
    active = numbers.shape[-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    if gates is None or numbers.numel() // active != len(flat):
        return None
    gates = gates.reshape(-1, active)
    run_alone = partial(_run_chosen, forward, gates)
    return Routing(flat, numbers.reshape(-1, active), gates, run_alone)


def _run_chosen(forward: Forward, gates: Tensor, states: Tensor, chosen: Tensor) -> Tensor:
    active = gates.shape[-1]
    ones = gates.new_ones(len(chosen), 1)
    try:
        outputs: Tensor = forward(states, chosen[:, None], ones)
    except (ValueError, IndexError):
        # It takes as many as a token has: the others are the same, by a gate of 0.
        gate = torch.cat([ones, gates.new_zeros(len(chosen), active - 1)], 1)
        outputs = forward(states, chosen[:, None].expand(-1, active).contiguous(), gate)
    return outputs


def _routing_of_all(forward: Forward, hidden: Tensor, count: int, output: Any) -> Routing | None:
    """Read a call that is given all tokens for one expert after the other.

    They are scaled by gates, which are 0 for an expert that is not chosen.
    """
    if hidden.ndim != 2 or output.shape != hidden.shape:
        return None
    by_expert = hidden.view(count, -1, hidden.shape[-1])
    used = (by_expert != 0).any(-1)  # [experts, tokens]
    numbers, tokens = used.nonzero(as_tuple=True)
    gates = used.new_ones(len(numbers), 1, dtype=hidden.dtype)
    run_alone = partial(_run_all, forward, count)
    return Routing(by_expert[numbers, tokens], numbers[:, None], gates, run_alone)


def _run_all(forward: Forward, count: int, states: Tensor, chosen: Tensor) -> Tensor:
    outputs: Tensor = forward(states.repeat(count, 1)).view(count, len(states), -1)
    return outputs[chosen, torch.arange(len(states), device=chosen.device)]


@contextmanager
def _wrapped_forward(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Have a module's calls go to `run`, which is given its own `forward` and the arguments."""
    before = vars(module).get("forward")
    module.forward = partial(run, module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
