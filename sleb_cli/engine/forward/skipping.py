"""Skip blocks of a model in memory, without touching its family's code.

A block switch takes the place of `forward` on one block *instance*. The list of blocks keeps its
length and order, so whatever the model looks up by index (masks, rotary tables, layer types) stays
right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sleb_cli.engine.device import input_device
from sleb_cli.engine.forward.block_weights import BlockWeights, execution_device
from sleb_cli.engine.forward.ending import Ending, LanguageHead
from sleb_cli.engine.forward.offload import align
from sleb_cli.engine.model.padded import Tokens
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins import UnsupportedModelError
from sleb_plugins.errors import explain_out_of_memory


@dataclass(frozen=True)
class Call:
    """The inputs of one block: hidden states, and others such as masks and rotary tables."""

    block: int
    entering: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class BlockSwitch:
    """Replaces a block's `forward`: runs it, or returns its input or the states in `inject`.

    `hook` is called with the states that enter and leave and the other inputs, and `fetch` before
    the block runs. `wraps` has a function for each class of blocks that makes hidden states a
    return value of theirs.
    """

    block: nn.Module
    wraps: dict[type[nn.Module], Callable[[Tensor], Any]]
    skip: bool = False
    inject: Tensor | None = None
    hook: Callable[[Tensor, Tensor, tuple[Any, ...], dict[str, Any]], None] | None = None
    fetch: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self.forward = self.block.forward
        self.instance_forward = vars(self.block).get("forward")  # such as accelerate's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the block's own arguments, and return what it would return."""
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        kind = type(self.block)
        # The first block of a class runs once even if it is skipped, to find how it wraps hidden
        # states.
        if not self.skip or kind not in self.wraps:
            if self.fetch is not None:
                self.fetch()
            output = self.forward(*args, **kwargs)
            self.wraps[kind] = _wrapper_like(output)
        if self.skip and self.inject is not None:
            output = self.wraps[kind](self.inject)
        elif self.skip:
            output = self.wraps[kind](entering)
        if self.hook is not None:
            others = dict(kwargs)
            others.pop("hidden_states", None)
            self.hook(entering, _hidden_states(output), args[1:], others)
        return output


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The last position of each sequence is not in one piece. In bfloat16, torch 2.13 then takes 22
    # s instead of 0.1 s on a CPU for 16 sequences and a vocabulary of 262,144. One sequence, which
    # takes 0.9 s, only seems to be in one piece: it still has the strides of the whole.
    return tuple(arg.flatten().view(arg.shape) if isinstance(arg, Tensor) else arg for arg in args)


def _hidden_states(output: Any) -> Tensor:
    if isinstance(output, tuple | list):
        output = output[0]
    hidden: Tensor = output
    return hidden


def _wrapper_like(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that wraps states as `output` does: alone, or first in a tuple or list."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    # The other elements hold extras that were not requested, such as attention weights.
    kind = type(output)
    others = [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *others])


def _count_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _require_values(output: Tensor, what: str) -> Tensor:
    if output.is_meta:  # weights on the meta device give a shape, and no error
        raise UnsupportedModelError(
            f"{what.capitalize()} returns a shape without values: some of its weights stayed on "
            f"the meta device.",
            hint="Leave out --device-map.",
        )
    return output


class SkippableModel:
    """A model whose blocks can be skipped; leaving the context restores it.

    Every pass raises UnsupportedModelError if the family's code fails, and OutOfMemory if the
    device is out of memory.

    Shapes: `ids` is [batch, positions], as a tensor or as padded texts; hidden states are [batch,
    positions, hidden size], logits [batch, positions, vocabulary]. The KV cache is off throughout:
    a skipped block would leave a hole in it.
    """

    def __init__(
        self,
        model: Any,
        blocks: Iterable[nn.Module],
        *,
        device: torch.device | None = None,
        weights: BlockWeights | None = None,
        ending: Ending | None = None,
    ) -> None:
        self.model = model
        self.ending = ending or LanguageHead()
        self.device: torch.device = device or input_device(model)
        """Where its tokens go in, and its logits come out."""
        self.weights = weights or BlockWeights()
        self._wraps: dict[type[nn.Module], Callable[[Tensor], Any]] = {}
        self.switches = [BlockSwitch(block, self._wraps) for block in blocks]
        self.places = [execution_device(switch.block) or self.device for switch in self.switches]
        """Where each block computes."""
        self._head_hook: RemovableHandle | None = None
        self._cache_settings = []
        for name in ("config", "generation_config"):
            config: Any = getattr(model, name, None)
            if hasattr(config, "use_cache"):
                self._cache_settings.append((config, config.use_cache))

    @property
    def head_blocks(self) -> float:
        """The weights of the output embeddings, in blocks."""
        output = self.model.get_output_embeddings()
        if output is None:
            return 0.0
        return _count_weights(output) / max(1, _count_weights(self.switches[0].block))

    def __enter__(self) -> SkippableModel:
        for switch in self.switches:
            switch.block.forward = switch
        for config, _ in self._cache_settings:
            config.use_cache = False
        output = self.model.get_output_embeddings()
        if output is not None:
            self._head_hook = output.register_forward_pre_hook(_contiguous)
        return self

    def __exit__(self, *error: object) -> None:
        for switch in self.switches:
            del switch.block.forward
            if switch.instance_forward is not None:
                switch.block.forward = switch.instance_forward
        for config, use_cache in self._cache_settings:
            config.use_cache = use_cache
        if self._head_hook is not None:
            self._head_hook.remove()

    def skip(self, removed: Collection[int]) -> None:
        """Skip exactly these blocks until the next call of any method."""
        for index, switch in enumerate(self.switches):
            switch.skip = index in removed
            switch.inject = None
            switch.hook = None
            switch.fetch = None

    def logits(self, ids: Tensor, removed: Collection[int], *, last: int = 0) -> Tensor:
        """Run the model without the removed blocks.

        With `last`, return the logits of the last positions, if the family supports that.
        """
        self.skip(removed)
        return self._logits(ids, last=last)

    def outputs(self, ids: Tokens, removed: Collection[int]) -> Any:
        """Return the output of transformers' model without the removed blocks."""
        self.skip(removed)
        return self._forward(ids)

    def outputs_of(self, hidden: Tensor, ids: Tokens) -> Any:
        """Return the model's output for hidden states that leave the last block."""
        # The model itself runs, for its final norm, its head, and the family's own steps.
        self.skip(range(len(self.switches)))
        self.switches[-1].inject = hidden
        return self._forward(ids)

    def run_with_hook(
        self,
        ids: Tokens,
        removed: Collection[int],
        hook: Callable[[int, Tensor, Tensor], None],
        start: tuple[int, Tensor] | None = None,
    ) -> None:
        """Run without the removed blocks; call `hook` with each other block, its input and output.

        `start` is a block and the hidden states that enter it: the blocks before it are not run.
        With a device map, all states are passed on the model's device.
        """
        first = 0
        if start:
            first = start[0]
        self.skip({*removed, *range(first)})
        if start and first > 0:
            self.switches[first - 1].inject = start[1]
        for block in range(first, len(self.switches)):
            if block not in removed:
                self.switches[block].hook = partial(self._pass_on, hook, block)
        self._forward(ids, last=1)

    def _pass_on(
        self,
        hook: Callable[[int, Tensor, Tensor], None],
        block: int,
        entering: Tensor,
        leaving: Tensor,
        *others: object,
    ) -> None:
        hook(block, entering.to(self.device), leaving.to(self.device))

    def calls(self, ids: Tokens) -> list[Call]:
        """Record the inputs of each block for these tokens; no block runs, so it costs little."""
        self.skip(range(len(self.switches)))
        calls: list[Call] = []
        for block, switch in enumerate(self.switches):
            switch.hook = lambda entering, _, args, kwargs, block=block: calls.append(
                Call(block, entering, args, kwargs)
            )
        self._forward(ids, last=1)
        self.skip(())
        order = [call.block for call in calls]
        if order != list(range(len(self.switches))):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} calls its blocks in the order {order}.",
                hint="Its blocks cannot be run on their own.",
            )
        return calls

    def align(self) -> None:
        """Align all weights, because fast kernels may round differently at other addresses."""
        self.weights.align()
        align(self.model)

    @contextmanager
    def loaded(self, block: int) -> Iterator[None]:
        """Have the weights of a block loaded while the context is open."""
        with self.weights.visit([block]) as visit:
            visit.load(block)
            yield

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters new values by name, while the context is open."""
        before: list[tuple[nn.Parameter, Tensor]] = []
        # Weights that are away now come with these values.
        with self.weights.replaced(values):
            try:
                for name, value in values.items():
                    parameter = self.model.get_parameter(name)
                    if not parameter.is_meta:
                        before.append((parameter, parameter.data))
                        parameter.data = value.to(parameter.device, parameter.dtype)
                yield
            finally:
                for parameter, data in before:
                    parameter.data = data

    def run_block(self, call: Call, hidden: Tensor) -> Tensor:
        """Run one block alone, as in a pass of the whole model, on states of the recorded shape."""
        hidden = hidden.to(self.places[call.block])  # states may be held where there is more memory
        with self._translate_errors(call.entering.shape, f"block {call.block} alone"):
            output = self.switches[call.block].forward(hidden, *call.args, **call.kwargs)
            return _require_values(_hidden_states(output), f"block {call.block}")

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of the last block's output, for a slice of positions with its `ids`."""
        # Positions do not depend on each other there, so no logits need to exist beyond the slice.
        return _require_values(self.outputs_of(hidden, ids).logits, "the model")

    def backward(self, result: Tensor, gradient: Tensor, shape: torch.Size) -> None:
        """Backpropagate the gradient of a pass's `result` to the trainable parameters.

        `shape` is that of the pass's tokens.
        """
        with self._translate_errors(shape, "backwards"):
            torch.autograd.backward(result, gradient)

    def _logits(self, ids: Tensor, *, last: int = 0) -> Tensor:
        return _require_values(self._forward(ids, last=last).logits, "the model")

    def _accepts(self, option: str) -> bool:
        return option in inspect.signature(self.model.forward).parameters

    def _forward(self, ids: Tokens, *, last: int = 0) -> Any:
        options: dict[str, Any] = {}
        if last and self._accepts("logits_to_keep"):
            options["logits_to_keep"] = last
        if isinstance(ids, Tensor):
            options |= {"input_ids": ids, "use_cache": False}
        else:
            options |= ids.inputs()
            if self._accepts("use_cache"):
                options["use_cache"] = False
        skipped = [index for index, switch in enumerate(self.switches) if switch.skip]
        without = f"without blocks {skipped}" if skipped else ""
        runs = self._blocks_that_run()
        with self.weights.visit(runs) as visit, self._translate_errors(ids.shape, without):
            if not self.weights.resident:
                for block in runs:
                    self.switches[block].fetch = partial(visit.load, block)
            return self.model(**options)

    def _blocks_that_run(self) -> list[int]:
        """Return the blocks that are not skipped, and the first of each class that is not known."""
        runs = []
        known = set(self._wraps)
        for index, switch in enumerate(self.switches):
            kind = type(switch.block)
            if not switch.skip or kind not in known:
                runs.append(index)
                known.add(kind)
        return runs

    @contextmanager
    def _translate_errors(self, shape: torch.Size, what: str) -> Iterator[None]:
        does_not_run = error_saying(
            UnsupportedModelError,
            f"{self.model.config.model_type} does not run {what}".rstrip(),
            "If the whole model runs in transformers, report the family to us.",
        )
        too_large = (
            f"{shape[0]} sequences of {shape[1]} tokens do not fit in the memory of {self.device}."
        )
        smaller = "Use a smaller --batch-size or --sequence-length, or --device cpu."
        with translate_errors(does_not_run), explain_out_of_memory(too_large, smaller):
            yield
