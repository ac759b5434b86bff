"""Switch blocks of a living model off and on, without touching a line of its family's code.

A gate takes the place of `forward` on one block *instance*. The list of blocks keeps its length and order,
so whatever the model looks up by index (masks, rotary tables, layer types) stays right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import OutOfMemory, memory_ended
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """What a model hands to one block beside the hidden states: masks, rotary tables, inputs of that depth."""

    block: int
    entering: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockSwitch:
    """Stands in for one block's `forward`: runs it, hands its input on, or hands given hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.skip = False
        self.inject: Tensor | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        self.record: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], None] | None = None
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
        if self.record is not None:
            self.record(entering, args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
        if self.skip:
            if self._wrap is None:
                self._wrap = _wrapping(self._forward(*args, **kwargs))
            output = self._wrap(entering if self.inject is None else self.inject)
        else:
            output = self._forward(*args, **kwargs)
            self._wrap = _wrapping(output)
        if self.watch is not None:
            self.watch(entering, _hidden_states(output))
        return output

    def run(self, hidden: Tensor, call: Call) -> Tensor:
        """Run the block on any hidden states, with the rest as it was recorded; give the hidden states that leave."""
        return _hidden_states(self._forward(hidden, *call.args, **call.kwargs))


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _wrapping(output: Any) -> Callable[[Tensor], Any]:
    """Learn from one output how a block hands hidden states on: alone, or before others, which nobody asked for."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    kind, others = type(output), [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *others])


class SkippableModel:
    """A model whose blocks can be switched off; leaving the context puts everything back.

    Any pass raises UnsupportedModelError where the family does not run so, and MachineError where memory ends.

    Shapes: `ids` is [batch, positions], hidden states are [batch, positions, hidden size], logits are
    [batch, positions, vocabulary]. The KV cache is off throughout: a block that is off would leave a hole.
    """

    def __init__(self, model: Any, blocks: Iterable[nn.Module]) -> None:
        self.model = model
        self.switches = [BlockSwitch(block) for block in blocks]
        self._cache_settings = [
            (config, config.use_cache)
            for config in (model.config, model.generation_config)
            if hasattr(config, "use_cache")
        ]

    def __enter__(self) -> SkippableModel:
        for switch in self.switches:
            switch.install()
        for config, _ in self._cache_settings:
            config.use_cache = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for switch in self.switches:
            switch.uninstall()
        for config, use_cache in self._cache_settings:
            config.use_cache = use_cache

    def switch_off(self, removed: Collection[int]) -> None:
        """Switch off exactly these blocks, until the next call of any method."""
        for index, switch in enumerate(self.switches):
            switch.skip, switch.inject, switch.watch, switch.record = index in removed, None, None, None

    def logits(self, ids: Tensor, removed: Collection[int], *, last: int = 0) -> Tensor:
        """Run the model without the removed blocks; with `last`, for so many positions where the family can do that."""
        self.switch_off(removed)
        return self._forward(ids, last=last)

    def logits_from(
        self, block: int, entering: Tensor, ids: Tensor, removed: Collection[int], *, last: int = 0
    ) -> Tensor:
        """Run the model without `block` and the removed ones, given the hidden states that enter `block`.

        Blocks before it are not computed: their result is what `entering` holds.
        """
        self.switch_off({*removed, *range(block + 1)})
        self.switches[block].inject = entering
        return self._forward(ids, last=last)

    def watch(
        self,
        ids: Tensor,
        removed: Collection[int],
        listen: Callable[[int, Tensor, Tensor], None],
        start: tuple[int, Tensor] | None = None,
    ) -> None:
        """Run the model without the removed blocks; tell of each other block what enters and what leaves it.

        With `start`, a block and the hidden states that enter it, those before it are not computed.
        """
        first = start[0] if start else 0
        self.switch_off({*removed, *range(first)})
        if start and first:
            self.switches[first - 1].inject = start[1]
        for index, switch in enumerate(self.switches):
            if index not in removed and index >= first:
                switch.watch = lambda entering, leaving, block=index: listen(block, entering, leaving)
        self._forward(ids, last=1)

    def calls(self, ids: Tensor) -> list[Call]:
        """Record what the model hands to each block for these tokens; with every block off, that costs next to nothing.

        Raises:
            UnsupportedModelError: a block is not called exactly once, in order.
        """
        self.switch_off(range(len(self.switches)))
        calls: list[Call] = []
        for index, switch in enumerate(self.switches):
            switch.record = lambda entering, args, kwargs, block=index: calls.append(
                Call(block, entering, args, kwargs)
            )
        self._forward(ids, last=1)
        self.switch_off(())
        if [call.block for call in calls] != list(range(len(self.switches))):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} calls its blocks in the order {[call.block for call in calls]}.",
                hint="Its blocks cannot be run on their own.",
            )
        return calls

    def run_block(self, call: Call, hidden: Tensor) -> Tensor:
        """Run one block alone, as in a pass of the whole model, on hidden states of the recorded shape."""
        with self._foreign(call.entering.shape, f"block {call.block} alone"):
            return self.switches[call.block].run(hidden, call)

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Give the logits of hidden states that leave the last block: final norm, head, and what the family does after.

        Each position stands for itself there, so any stretch of them may be given, with its own `ids`; no more
        logits than that exist.
        """
        self.switch_off(range(len(self.switches)))
        self.switches[-1].inject = hidden
        return self._forward(ids)

    def backward(self, states: Tensor, gradient: Tensor) -> None:
        """Add the gradients that follow from that of `states`, which a pass gave, to the trainable parameters."""
        with self._foreign(states.shape, "backwards"):
            torch.autograd.backward(states, gradient)

    def entering_states(self, ids: Tensor, removed: Collection[int]) -> dict[int, Tensor]:
        """Give, for each block that is not removed, the hidden states that enter it."""
        states: dict[int, Tensor] = {}

        def keep(block: int, entering: Tensor, leaving: Tensor) -> None:
            states[block] = entering

        self.watch(ids, removed, keep)
        return states

    def _forward(self, ids: Tensor, *, last: int = 0) -> Tensor:
        options = {"logits_to_keep": last} if last and self._can_keep_few_logits else {}
        off = [index for index, switch in enumerate(self.switches) if switch.skip]
        with self._foreign(ids.shape, f"without blocks {off}" if off else ""):
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits
        return logits

    @contextmanager
    def _foreign(self, shape: torch.Size, what: str) -> Iterator[None]:
        """Run the family's own code, which may not bear that a block does nothing."""

        def does_not_run(words: str) -> UnsupportedModelError:
            return UnsupportedModelError(
                f"{self.model.config.model_type} does not run{what and ' ' + what}: {words}.",
                hint="If it runs whole in transformers, report the family to us.",
            )

        with translate_errors(does_not_run):
            try:
                yield
            except RuntimeError as error:
                if not memory_ended(error):
                    raise
                raise OutOfMemory(
                    f"{shape[0]} sequences of {shape[1]} tokens do not fit into the memory of {self.model.device}.",
                    hint="Take a smaller --batch-size or --sequence-length, or --device cpu.",
                ) from error

    @property
    def _can_keep_few_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters
