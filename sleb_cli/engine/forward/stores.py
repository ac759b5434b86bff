"""Where hidden states wait for the next block: where they were computed, or in host memory.

If blocks are streamed, a step needs the hidden states of all calibration sequences and of all
branches at once, since its weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.model.padded import Tokens

Store = Callable[[Tensor], Tensor]
"""Moves hidden states to where they wait."""

MAX_SHARED = 64
"""With more tensors to compare with, batches share too little for the comparisons to pay."""


def keep_on_device(hidden: Tensor) -> Tensor:
    """Let hidden states wait where they were computed."""
    return hidden


def to_cpu(hidden: Tensor) -> Tensor:
    """Let hidden states wait in host memory."""
    return hidden.to(CPU)


@dataclass(eq=False)
class SharedInputs:
    """The other inputs of blocks, such as masks: held once where batches have equal ones."""

    skippable: SkippableModel
    store: Store
    _shared: list[Tensor] = field(default_factory=list, init=False)

    def calls(self, ids: Tokens) -> list[Call]:
        """Record the blocks' calls for these tokens, reusing equal tensors of earlier calls."""
        calls = self.skippable.calls(ids)
        entering = self.store(calls[0].entering)
        find = cache(self._find)
        shared = []
        for call in calls:
            args = tree_map_only(Tensor, find, call.args)
            kwargs = tree_map_only(Tensor, find, call.kwargs)
            shared.append(Call(call.block, entering, args, kwargs))
        return shared

    def _find(self, value: Tensor) -> Tensor:
        for shared in self._shared:
            same_kind = shared.shape == value.shape and shared.dtype == value.dtype
            if same_kind and torch.equal(shared, value):
                return shared
        if len(self._shared) < MAX_SHARED:
            self._shared.append(value)
        return value
