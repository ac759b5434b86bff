"""Switch blocks of a living model off and on, without touching a line of its family's code.

A gate takes the place of `forward` on one block *instance*. The list of blocks keeps its length and order,
so whatever the model looks up by index (masks, rotary tables, layer types) stays right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.foreign import verdict
from sleb_plugins import MachineError, UnsupportedModelError


class Gate:
    """Stands in for one block's `forward`: runs it, hands its input on, or hands given hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.skip = False
        self.inject: Tensor | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        self._forward = block.forward
        self._own_forward = vars(block).get("forward")
        self._wrap: Callable[[Tensor], Any] | None = None

    def install(self) -> None:
        """Take the place of the block's `forward`."""
        self.block.forward = self

    def uninstall(self) -> None:
        """Put back what was there: the class's `forward`, or one that somebody had set on the instance."""
        del self.block.forward
        if self._own_forward is not None:
            self.block.forward = self._own_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Be called as the block is."""
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.skip:
            if self._wrap is None:
                self._wrap = _wrapping(self._forward(*args, **kwargs))
            output = self._wrap(entering if self.inject is None else self.inject)
        else:
            output = self._forward(*args, **kwargs)
            self._wrap = _wrapping(output)
        if self.watch is not None:
            self.watch(entering, output[0] if isinstance(output, tuple | list) else output)
        return output


def _wrapping(output: Any) -> Callable[[Tensor], Any]:
    """Learn from one output how a block hands hidden states on: alone, or before others, which nobody asked for."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    kind, others = type(output), [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *others])


class GatedModel:
    """A model whose blocks can be switched off; leaving the context puts everything back.

    Any pass raises UnsupportedModelError where the family does not run so, and MachineError where memory ends.

    Shapes: `ids` is [batch, positions], hidden states are [batch, positions, hidden size], logits are
    [batch, positions, vocabulary]. The KV cache is off throughout: a block that is off would leave a hole.
    """

    def __init__(self, model: Any, blocks: Iterable[nn.Module]) -> None:
        self.model = model
        self.gates = [Gate(block) for block in blocks]
        self._cache_settings = [
            (config, config.use_cache)
            for config in (model.config, model.generation_config)
            if hasattr(config, "use_cache")
        ]

    def __enter__(self) -> GatedModel:
        for gate in self.gates:
            gate.install()
        for config, _ in self._cache_settings:
            config.use_cache = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for gate in self.gates:
            gate.uninstall()
        for config, use_cache in self._cache_settings:
            config.use_cache = use_cache

    def switch_off(self, removed: Collection[int]) -> None:
        """Switch off exactly these blocks, until the next call of any method."""
        for index, gate in enumerate(self.gates):
            gate.skip, gate.inject, gate.watch = index in removed, None, None

    def logits(self, ids: Tensor, removed: Collection[int]) -> Tensor:
        """Run the model without the removed blocks."""
        self.switch_off(removed)
        return self._forward(ids)

    def logits_from(self, block: int, entering: Tensor, ids: Tensor, removed: Collection[int]) -> Tensor:
        """Run the model without `block` and the removed ones, given the hidden states that enter `block`.

        Blocks before it are not computed: their result is what `entering` holds.
        """
        self.switch_off({*removed, *range(block + 1)})
        self.gates[block].inject = entering
        return self._forward(ids)

    def watch(self, ids: Tensor, removed: Collection[int], listen: Callable[[int, Tensor, Tensor], None]) -> None:
        """Run the model without the removed blocks; tell of each other block what enters and what leaves it."""
        self.switch_off(removed)
        for index, gate in enumerate(self.gates):
            if index not in removed:
                gate.watch = lambda entering, leaving, block=index: listen(block, entering, leaving)
        # Nobody asks for the logits here, and the head is half the work of a small model.
        self._forward(ids, **({"logits_to_keep": 1} if self._can_keep_few_logits else {}))

    def entering_states(self, ids: Tensor, removed: Collection[int]) -> dict[int, Tensor]:
        """Give, for each block that is not removed, the hidden states that enter it."""
        states: dict[int, Tensor] = {}

        def keep(block: int, entering: Tensor, leaving: Tensor) -> None:
            states[block] = entering

        self.watch(ids, removed, keep)
        return states

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        with verdict(self._does_not_run):  # a family's own code may not bear that a block does nothing
            try:
                logits: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits
            except torch.OutOfMemoryError as error:
                raise MachineError(
                    f"{ids.shape[0]} sequences of {ids.shape[1]} tokens do not fit into the memory of {ids.device}.",
                    hint="Take a smaller --batch-size or --sequence-length, or --device cpu.",
                ) from error
        return logits

    def _does_not_run(self, words: str) -> UnsupportedModelError:
        off = [index for index, gate in enumerate(self.gates) if gate.skip]
        without = f" without blocks {off}" if off else ""
        return UnsupportedModelError(
            f"{self.model.config.model_type} does not run{without}: {words}.",
            hint="If it runs whole in transformers, report the family to us.",
        )

    @property
    def _can_keep_few_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters
