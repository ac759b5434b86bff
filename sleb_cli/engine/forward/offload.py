"""Weights that accelerate keeps in CPU memory or on disk, and moves to a device while their module
runs.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sleb_cli.engine.forward.block_weights import BlockWeights, aligned


class OffloadedValues(ChainMap[str, Tensor]):
    """The values of a model's offloaded weights by name, from which its modules take them; the
    stored ones come last.

    If `align` is set, all lie at multiples of 64 bytes; otherwise, weights on disk lie as in their
    file.
    """

    align = False

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return aligned(value) if self.align else value


def align(model: Any) -> None:
    """Align the weights of a model, because fast kernels may round differently at other addresses."""
    if (offloaded := offloaded_values(model)) is not None:
        offloaded.align = True
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)


def offloaded_values(model: Any) -> OffloadedValues | None:
    """Return the values of a model's offloaded weights, which from then on go through here; None if
    it has none.
    """
    hooks = [hook for module in model.modules() if (hook := _offloading_hook(module))]
    if not hooks:
        return None
    stored = hooks[0].weights_map.dataset  # shared by all hooks, with a prefix for each
    values = stored if isinstance(stored, OffloadedValues) else OffloadedValues(stored)
    for hook in hooks:
        hook.weights_map.dataset = values
    return values


class OffloadedBlocks(BlockWeights):
    """Blocks, some of whose weights are in place only while they are visited or accelerate runs
    them.
    """

    def __init__(self, values: OffloadedValues, blocks: Sequence[nn.Module]) -> None:
        self._values, self._blocks = values, blocks

    def visit(self, blocks: Iterable[int]) -> Generator[int]:
        """Yield these blocks, each with its weights where it computes."""
        for block in blocks:
            with loaded(self._blocks[block]):
                yield block

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run modules with new values, by name, while the context is open."""
        self._values.maps.insert(0, dict(values))
        try:
            yield
        finally:
            del self._values.maps[0]


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Put the offloaded weights of a module where it runs, while the context is open."""
    # Until then, offloaded parameters are on the meta device.
    placed: list[tuple[nn.Module, Any]] = []
    try:
        for submodule in module.modules():
            if hook := _offloading_hook(submodule):
                hook.pre_forward(submodule)
                hook.offload = (
                    False  # or accelerate would take the weights away when the module has run
                )
                placed.append((submodule, hook))
        yield
    finally:
        for submodule, hook in placed:
            hook.offload = True
            hook.post_forward(submodule, ())


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None
