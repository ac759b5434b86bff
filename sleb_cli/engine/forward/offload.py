"""Weights that accelerate keeps in CPU memory or on disk until their module runs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sleb_cli.engine.forward.block_weights import BlockWeights, Visit, aligned


class OffloadedValues(ChainMap[str, Tensor]):
    """The values of a model's offloaded weights by name; the stored ones come last.

    If `align` is set, all lie at multiples of 64 bytes; otherwise, weights on disk lie as in their
    file.
    """

    align = False

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        if self.align:
            return aligned(value)
        return value


def align(model: Any) -> None:
    """Align a model's weights, because fast kernels may round differently at other addresses."""
    offloaded = offloaded_values(model)
    if offloaded is not None:
        offloaded.align = True
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)


def offloaded_values(model: Any) -> OffloadedValues | None:
    """Return the values of a model's offloaded weights; None if it has none.

    From then on, they go through here.
    """
    values: OffloadedValues | None = None
    for module in model.modules():
        hook = _offloading_hook(module)
        if hook is None:
            continue
        stored = hook.weights_map.dataset  # shared by all hooks, with a prefix for each
        if isinstance(stored, OffloadedValues):
            values = stored
        elif values is None:
            values = OffloadedValues(stored)
        hook.weights_map.dataset = values
    return values


@dataclass
class OffloadedBlocks(BlockWeights):
    """Blocks with weights that are in place only while visited, or while accelerate runs them."""

    values: OffloadedValues
    blocks: Sequence[nn.Module]

    def visit(self, blocks: Sequence[int]) -> Visit:
        """Return a visit to these blocks, which puts the weights of each where it computes."""
        return _OffloadedVisit(self.blocks)

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run modules with new values, by name, while the context is open."""
        self.values.maps.insert(0, dict(values))
        try:
            yield
        finally:
            del self.values.maps[0]


@dataclass
class _OffloadedVisit(Visit):
    blocks: Sequence[nn.Module]
    _loaded: ExitStack = field(default_factory=ExitStack, init=False)

    def load(self, block: int) -> None:
        self.close()
        self._loaded.enter_context(loaded(self.blocks[block]))

    def close(self) -> None:
        self._loaded.close()


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Put the offloaded weights of a module where it runs, while the context is open."""
    # Until then, offloaded parameters are on the meta device.
    placed: list[tuple[nn.Module, Any]] = []
    try:
        for submodule in module.modules():
            hook = _offloading_hook(submodule)
            if hook is not None:
                hook.pre_forward(submodule)
                # Otherwise accelerate would take the weights away when the module has run.
                hook.offload = False
                placed.append((submodule, hook))
        yield
    finally:
        for submodule, hook in placed:
            hook.offload = True
            hook.post_forward(submodule, ())


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return hook
    return None
