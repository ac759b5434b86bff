"""What a model computes if some experts cannot be chosen, and what each expert makes, without a family's code."""

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
    experts: Experts, blocks: Sequence[nn.Module], removed: Mapping[int, Sequence[int]], model_type: str
) -> Iterator[None]:
    """Have no router choose these experts, by block: what it computes of them, and the biases of the choice, are -inf.

    All of it happens while the router runs, so its weights may have come from the disk just before.

    Raises:
        UnsupportedModelError: at the end, if a block has run and its router was not reached.
    """
    modes: dict[int, list[_Masked]] = {block: [] for block in experts.blocks if removed.get(block)}
    with ExitStack() as stack:
        for block, of_block in modes.items():
            for child in sorted({name.partition(".")[0] for name in experts.router}):
                router = experts.router.items()
                own = {name.removeprefix(f"{child}."): part for name, part in router if name.startswith(f"{child}.")}
                module, gone = blocks[block].get_submodule(child), torch.tensor(sorted(removed[block]))
                of_block.append(_Masked(module, own, gone))
                stack.enter_context(_replaced(module, of_block[-1].around))
        yield
    for block, of_block in modes.items():
        if any(mode.runs for mode in of_block) and not any(mode.hits for mode in of_block):
            raise UnsupportedModelError(
                f"The experts of {model_type} cannot be left out: sleb does not reach the router of block {block}.",
                hint="Open an issue that names this family.",
            )


class _Masked(TorchFunctionMode):
    """Puts -inf on the last axis of what is computed with a router's weights, or with casts or views of them.

    Lists by expert, such as biases of the choice, are given with -inf in these places. Of a scale by expert, those are
    never read. A tensor is known when it is used, as weights may come from the disk just before.
    """

    def __init__(self, module: nn.Module, router: Mapping[str, Part], gone: Tensor) -> None:
        super().__init__()
        names = [(name.rpartition("."), part) for name, part in router.items()]
        self.router = [(module.get_submodule(owner), last, part) for (owner, _, last), part in names]
        self.derived, self.gone, self.runs, self.hits = dict[int, Tensor](), gone, 0, 0

    def around(self, own: Forward) -> Forward:
        """Mask what a forward function computes."""

        def masked(*args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            try:
                with self:
                    return own(*args, **kwargs)
            finally:
                self.derived.clear()

        return masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, router = kwargs or {}, {id(getattr(owner, last)): part for owner, last, part in self.router}
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        lists = {
            id(each): self._masked(each, part.axis)
            for each in given
            if (part := router.get(id(each))) and each.numel() == each.shape[part.axis]
        }
        args = [lists.get(id(each), each) for each in args]
        output = func(*args, **{name: lists.get(id(each), each) for name, each in kwargs.items()})
        is_theirs = any(id(each) in self.derived or id(each) in router.keys() - lists.keys() for each in given)
        if not is_theirs or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if len(given) == 1:
            self.derived[id(output)] = output  # kept alive, so that no other tensor gets its number
            return output
        self.hits += 1
        return self._masked(output, -1)

    def _masked(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.index_fill(axis, self.gone.to(tensor.device), float("-inf"))


class TiesByNumber(TorchFunctionMode):
    """Has `topk` take the lower of equals, so that a model and its cut, which keeps their order, choose alike.

    torch takes any of them, by how many there are. In bfloat16, a router's logits are often equal.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_topk if func in (torch.topk, Tensor.topk) else func)(*args, **(kwargs or {}))


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Return what `torch.topk` of these arguments does, the lower of equals first."""
    values, places = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), places.narrow(dim, 0, k)))


@dataclass(frozen=True)
class Choice:
    """Which experts a block's router chose for some tokens, and what they make.

    Attributes:
        hidden: what the experts are given, [tokens, width].
        experts: their numbers, int64 [tokens, active]; numbers from the count on are experts that compute nothing.
        gates: the weight of each, [tokens, active].
        alone: returns what chosen experts make of other hidden states, [tokens, width] and [tokens], by a gate of 1.
    """

    hidden: Tensor
    experts: Tensor
    gates: Tensor
    alone: Callable[[Tensor, Tensor], Tensor]


@contextmanager
def watched(experts: Experts, blocks: Sequence[nn.Module], tell: Callable[[int, Choice], object]) -> Iterator[None]:
    """Tell of each choice of a block, by its number; what the model computes stays as it is.

    The call of the experts is that of the module with their weights, or of one around it, which is given the experts
    and gates of each token.
    """
    with ExitStack() as stack:
        for block in experts.blocks:
            path = experts.module
            while path:
                module, all_at_once = blocks[block].get_submodule(path), path == experts.module
                stack.enter_context(_replaced(module, _telling(experts.count, block, tell, all_at_once=all_at_once)))
                path = path.rpartition(".")[0]
        yield


def _telling(count: int, block: int, tell: Callable[[int, Choice], object], *, all_at_once: bool) -> Any:
    def told(own: Forward, *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        hidden, *given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        choice = _choice(own, hidden, given)
        if choice is None and all_at_once and not given and hidden.ndim == 2 and output.shape == hidden.shape:
            choice = _choice_of_all(own, hidden, count)
        if choice is not None:
            tell(block, choice)
        return output

    return lambda own: partial(told, own)


def _choice(own: Forward, hidden: Tensor, given: Sequence[Tensor]) -> Choice | None:
    """Read a call that is given the experts of each token and their gates, told apart by their types."""
    numbers = next((each for each in given if each.dtype in (torch.int64, torch.int32)), None)
    if numbers is None or numbers.ndim < 2:
        return None
    active, flat = numbers.shape[-1], hidden.reshape(-1, hidden.shape[-1])
    gates = next((each for each in given if each.is_floating_point() and each.shape == numbers.shape), None)
    if gates is None or numbers.numel() // active != len(flat):
        return None

    def alone(states: Tensor, chosen: Tensor) -> Tensor:
        one = gates.new_ones(len(chosen), 1)
        try:
            made: Tensor = own(states, chosen[:, None], one)
        except (ValueError, IndexError):  # it takes as many as a token has: the same again, by a gate of 0
            gate = torch.cat([one, gates.new_zeros(len(chosen), active - 1)], 1)
            made = own(states, chosen[:, None].expand(-1, active).contiguous(), gate)
        return made

    return Choice(flat, numbers.reshape(-1, active), gates.reshape(-1, active), alone)


def _choice_of_all(own: Forward, hidden: Tensor, count: int) -> Choice:
    """Read a call that is given all tokens for one expert after the other, scaled by gates (0 for one not chosen)."""

    def alone(states: Tensor, chosen: Tensor) -> Tensor:
        first: Tensor = own(states.repeat(count, 1)).view(count, len(states), -1)
        return first[chosen, torch.arange(len(states), device=chosen.device)]

    of_expert = hidden.view(count, -1, hidden.shape[-1])
    used = (of_expert != 0).any(-1)  # [experts, tokens]
    numbers, tokens = used.nonzero(as_tuple=True)
    return Choice(
        of_expert[numbers, tokens], numbers[:, None], used.new_ones(len(numbers), 1, dtype=hidden.dtype), alone
    )


@contextmanager
def _replaced(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Replace what a module computes, on its instance."""
    before = vars(module).get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
