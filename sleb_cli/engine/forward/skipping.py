"""Skip blocks of a model in memory, without touching its family's code.

A block switch takes the place of `forward` on one block *instance*. The list of blocks keeps its length and order, so
whatever the model looks up by index (masks, rotary tables, layer types) stays right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import translate_out_of_memory
from sleb_cli.engine.third_party import our_code, translate_errors
from sleb_plugins import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """What a model passes to one block: hidden states, and the masks, rotary tables and other inputs beside them."""

    block: int
    entering: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockSwitch:
    """Replaces one block's `forward`: runs it, or returns its input, or returns the hidden states in `inject`."""

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
        """Replace the block's `forward`."""
        self.block.forward = self

    def uninstall(self) -> None:
        """Restore the class's `forward`, or the one that was set on the instance."""
        del self.block.forward
        if self._own_forward is not None:
            self.block.forward = self._own_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the block's own arguments, and return what it would return."""
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.record is not None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            with our_code():
                self.record(entering, args[1:], others)
        if self.skip:
            if self._wrap is None:
                self._wrap = _wrapper_like(self._forward(*args, **kwargs))
            output = self._wrap(entering if self.inject is None else self.inject)
        else:
            output = self._forward(*args, **kwargs)
            self._wrap = _wrapper_like(output)
        if self.watch is not None:
            leaving = _hidden_states(output)
            with our_code():
                self.watch(entering, leaving)
        return output

    def run(self, hidden: Tensor, call: Call) -> Tensor:
        """Run the block on these hidden states, with the other inputs of a recorded call; return what leaves it."""
        return _hidden_states(self._forward(hidden, *call.args, **call.kwargs))


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _wrapper_like(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that wraps hidden states as `output` does: alone, or first in a tuple or list filled with None.

    The other elements hold what nobody asked for, such as attention weights.
    """
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    kind, others = type(output), [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *others])


def sequences_fit(shape: torch.Size, device: torch.device) -> AbstractContextManager[None]:
    """Say what did not fit if a pass over tokens of this shape, [batch, positions], runs out of memory."""
    return translate_out_of_memory(
        f"{shape[0]} sequences of {shape[1]} tokens do not fit into the memory of {device}.",
        "Use a smaller --batch-size or --sequence-length, or --device cpu.",
    )


class SkippableModel:
    """A model whose blocks can be skipped; leaving the context restores it.

    Every pass raises UnsupportedModelError if the family's code fails, and OutOfMemory if the device is out of memory.

    Shapes: `ids` is [batch, positions], hidden states are [batch, positions, hidden size], logits are
    [batch, positions, vocabulary]. The KV cache is off throughout: a skipped block would leave a hole in it.
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

    def skip(self, removed: Collection[int]) -> None:
        """Skip exactly these blocks until the next call of any method."""
        for index, switch in enumerate(self.switches):
            switch.skip, switch.inject, switch.watch, switch.record = index in removed, None, None, None

    def logits(self, ids: Tensor, removed: Collection[int], *, last: int = 0) -> Tensor:
        """Run the model without the removed blocks.

        With `last`, only the last `last` positions have logits if the family supports that; otherwise all have.
        """
        self.skip(removed)
        return self._forward(ids, last=last)

    def watch(
        self,
        ids: Tensor,
        removed: Collection[int],
        listen: Callable[[int, Tensor, Tensor], None],
        start: tuple[int, Tensor] | None = None,
    ) -> None:
        """Run the model without the removed blocks; pass to `listen` each other block and what enters and leaves it.

        `start` is a block and the hidden states that enter it: the blocks before it are not run. An exception raised by
        `listen` is raised unchanged.
        """
        first = start[0] if start else 0
        self.skip({*removed, *range(first)})
        if start and first:
            self.switches[first - 1].inject = start[1]
        for index, switch in enumerate(self.switches):
            if index not in removed and index >= first:
                switch.watch = lambda entering, leaving, block=index: listen(block, entering, leaving)
        self._forward(ids, last=1)

    def calls(self, ids: Tensor) -> list[Call]:
        """Record what the model passes to each block for these tokens; every block is skipped, so it costs little.

        Raises:
            UnsupportedModelError: a block is not called exactly once, in order.
        """
        self.skip(range(len(self.switches)))
        calls: list[Call] = []
        for index, switch in enumerate(self.switches):
            switch.record = lambda entering, args, kwargs, block=index: calls.append(
                Call(block, entering, args, kwargs)
            )
        self._forward(ids, last=1)
        self.skip(())
        if [call.block for call in calls] != list(range(len(self.switches))):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} calls its blocks in the order {[call.block for call in calls]}.",
                hint="Its blocks cannot be run on their own.",
            )
        return calls

    def run_block(self, call: Call, hidden: Tensor) -> Tensor:
        """Run one block alone, as in a pass of the whole model, on hidden states of the recorded shape."""
        with self._translate_errors(call.entering.shape, f"block {call.block} alone"):
            return self.switches[call.block].run(hidden, call)

    def run_blocks(self, calls: Sequence[Call], hidden: Tensor, removed: Collection[int] = ()) -> Iterator[Tensor]:
        """Run the blocks of these calls one after another, and yield `hidden` and what leaves each of them.

        What leaves a removed block is what enters it.
        """
        yield hidden
        for call in calls:
            if call.block not in removed:
                hidden = self.run_block(call, hidden)
            yield hidden

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of hidden states that leave the last block: final norm, head, and the family's own steps.

        Positions do not depend on each other there, so any slice of them will do, with its own `ids`; no logits exist
        beyond the slice.
        """
        self.skip(range(len(self.switches)))
        self.switches[-1].inject = hidden
        return self._forward(ids)

    def backward(self, states: Tensor, gradient: Tensor) -> None:
        """Backpropagate the gradient of `states`, which a pass returned, to the trainable parameters."""
        with self._translate_errors(states.shape, "backwards"):
            torch.autograd.backward(states, gradient)

    def entering_states(self, ids: Tensor, removed: Collection[int]) -> dict[int, Tensor]:
        """Return the hidden states that enter each block that is not removed."""
        states: dict[int, Tensor] = {}

        def keep(block: int, entering: Tensor, leaving: Tensor) -> None:
            states[block] = entering

        self.watch(ids, removed, keep)
        return states

    def _forward(self, ids: Tensor, *, last: int = 0) -> Tensor:
        options = {"logits_to_keep": last} if last and self._takes_logits_to_keep else {}
        skipped = [index for index, switch in enumerate(self.switches) if switch.skip]
        with self._translate_errors(ids.shape, f"without blocks {skipped}" if skipped else ""):
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits
        return logits

    @contextmanager
    def _translate_errors(self, shape: torch.Size, what: str) -> Iterator[None]:
        """Translate the errors of the family's own code, which may not work when blocks are skipped or run alone."""

        def does_not_run(words: str) -> UnsupportedModelError:
            return UnsupportedModelError(
                f"{self.model.config.model_type} does not run{what and ' ' + what}: {words}.",
                hint="If it runs whole in transformers, report the family to us.",
            )

        with translate_errors(does_not_run), sequences_fit(shape, self.model.device):
            yield

    @property
    def _takes_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters
