"""Run a model as if some experts could not be chosen, and watch its routers choose, without a
family's code.
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

from sleb_cli.engine.model.experts import Experts, Part
from sleb_plugins import UnsupportedModelError

Forward = Callable[..., Any]


@contextmanager
def without_experts(
    experts: Experts,
    blocks: Sequence[nn.Module],
    removed: Mapping[int, Sequence[int]],
    model_type: str,
) -> Iterator[None]:
    """Have no router choose these experts, by block: their logits, and their biases of the choice,
    are -inf.

    Raises:
        UnsupportedModelError: at the end, if a block has run and its router was not reached.
    """
    # A mode, and not new weights: they may come from the disk just before the router runs.
    modes: dict[int, list[_Masked]] = {block: [] for block in experts.blocks if removed.get(block)}
    with ExitStack() as stack:
        for block, in_block in modes.items():
            for child in sorted({name.partition(".")[0] for name in experts.router}):
                prefix = f"{child}."
                names = (name for name in experts.router if name.startswith(prefix))
                in_child = {name.removeprefix(prefix): experts.router[name] for name in names}
                module, numbers = (
                    blocks[block].get_submodule(child),
                    torch.tensor(sorted(removed[block])),
                )
                in_block.append(_Masked(module, in_child, numbers))
                stack.enter_context(_wrapped_forward(module, in_block[-1].around))
        yield
    for block, in_block in modes.items():
        if any(mode.runs for mode in in_block) and not any(mode.hits for mode in in_block):
            raise UnsupportedModelError(
                f"The experts of {model_type} cannot be left out: sleb does not reach the router "
                f"of block {block}.",
                hint="Open an issue that names this family.",
            )


class _Masked(TorchFunctionMode):
    """Puts -inf on the last axis of results computed with a router's weights, or with casts or
    views of them.

    Biases of the choice, by expert, also get -inf. In a scale by expert, these entries are never
    read.
    """

    def __init__(self, module: nn.Module, router: Mapping[str, Part], removed: Tensor) -> None:
        super().__init__()
        paths = [(name.rpartition("."), part.axis) for name, part in router.items()]
        self.router = [
            (module.get_submodule(owner), last, axis) for (owner, _, last), axis in paths
        ]
        self.derived, self.removed, self.runs, self.hits = dict[int, Tensor](), removed, 0, 0

    def around(self, forward: Forward) -> Forward:
        def masked(*args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            try:
                with self:
                    return forward(*args, **kwargs)
            finally:
                self.derived.clear()

        return masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, axes = (
            kwargs or {},
            {id(getattr(owner, last)): axis for owner, last, axis in self.router},
        )
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        lists = {
            id(tensor): self._masked(tensor, axis)
            for tensor in tensors
            if (axis := axes.get(id(tensor))) is not None and tensor.numel() == tensor.shape[axis]
        }
        args = [lists.get(id(value), value) for value in args]
        output = func(
            *args, **{name: lists.get(id(value), value) for name, value in kwargs.items()}
        )
        from_router = any(
            id(tensor) in self.derived or id(tensor) in axes.keys() - lists.keys()
            for tensor in tensors
        )
        if not from_router or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        # From one tensor comes a cast or a view of the weights; the product with hidden states has
        # two.
        if len(tensors) == 1:
            self.derived[id(output)] = output  # kept alive, so that no other tensor gets its id
            return output
        self.hits += 1
        return self._masked(output, -1)

    def _masked(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.index_fill(axis, self.removed.to(tensor.device), float("-inf"))


class TiesByNumber(TorchFunctionMode):
    """Has `topk` take the lower of equals, so that a model and its cut, which keeps their order,
    choose alike.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_topk if func in (torch.topk, Tensor.topk) else func)(*args, **(kwargs or {}))


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
            # The experts are called through the module with their weights, or through one around
            # it.
            path = experts.module
            while path:
                module, all_at_once = blocks[block].get_submodule(path), path == experts.module
                report = _reporting(experts.count, block, listen, all_at_once=all_at_once)
                stack.enter_context(_wrapped_forward(module, report))
                path = path.rpartition(".")[0]
        yield


def _reporting(
    count: int, block: int, listen: Callable[[int, Routing], object], *, all_at_once: bool
) -> Any:
    def call_and_report(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden, *others = (
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)
        )
        routing = _routing_of_tokens(forward, hidden, others)
        if (
            routing is None
            and all_at_once
            and not others
            and hidden.ndim == 2
            and output.shape == hidden.shape
        ):
            routing = _routing_of_all(forward, hidden, count)
        if routing is not None:
            listen(block, routing)
        return output

    return lambda forward: partial(call_and_report, forward)


def _routing_of_tokens(
    forward: Forward, hidden: Tensor, others: Sequence[Tensor]
) -> Routing | None:
    """Read a call that is given the experts of each token and their gates, which differ in type."""
    numbers = next(
        (tensor for tensor in others if tensor.dtype in (torch.int64, torch.int32)), None
    )
    if numbers is None or numbers.ndim < 2:
        return None
    active, flat = numbers.shape[-1], hidden.reshape(-1, hidden.shape[-1])
    gates = next(
        (
            tensor
            for tensor in others
            if tensor.is_floating_point() and tensor.shape == numbers.shape
        ),
        None,
    )
    if gates is None or numbers.numel() // active != len(flat):
        return None

    def run_alone(states: Tensor, chosen: Tensor) -> Tensor:
        ones = gates.new_ones(len(chosen), 1)
        try:
            outputs: Tensor = forward(states, chosen[:, None], ones)
        except (
            ValueError,
            IndexError,
        ):  # it takes as many as a token has: the others are the same, by a gate of 0
            gate = torch.cat([ones, gates.new_zeros(len(chosen), active - 1)], 1)
            outputs = forward(states, chosen[:, None].expand(-1, active).contiguous(), gate)
        return outputs

    return Routing(flat, numbers.reshape(-1, active), gates.reshape(-1, active), run_alone)


def _routing_of_all(forward: Forward, hidden: Tensor, count: int) -> Routing:
    """Read a call that is given all tokens for one expert after the other, scaled by gates (0: not
    chosen).
    """

    def run_alone(states: Tensor, chosen: Tensor) -> Tensor:
        first: Tensor = forward(states.repeat(count, 1)).view(count, len(states), -1)
        return first[chosen, torch.arange(len(states), device=chosen.device)]

    by_expert = hidden.view(count, -1, hidden.shape[-1])
    used = (by_expert != 0).any(-1)  # [experts, tokens]
    numbers, tokens = used.nonzero(as_tuple=True)
    return Routing(
        by_expert[numbers, tokens],
        numbers[:, None],
        used.new_ones(len(numbers), 1, dtype=hidden.dtype),
        run_alone,
    )


@contextmanager
def _wrapped_forward(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
