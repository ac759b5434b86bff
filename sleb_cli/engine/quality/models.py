"""The dense and the pruned models of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU, free_memory
from sleb_cli.engine.forward.ending import ending_of
from sleb_cli.engine.forward.fork_check import why_not_fork
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.predictions import SharedPredictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.padded import Tokens
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.vocabularies import SharedTokens
from sleb_cli.engine.surgery.loading import Placement, load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify
from sleb_cli.order import OTHER, SizeKey

# Enough tokens to check that the model may be run block by block.
CHECKED_TOKENS = 64


class Models:
    """The dense model and one for each size, loaded when first needed, with shared weights.

    If they cannot share weights, only one is loaded at a time. In a comparison, the other model
    has the key `OTHER`.
    """

    def __init__(
        self,
        subject: Subject,
        surgeries: Sequence[Surgery],
        placement: Placement,
        group: ProcessGroup,
        notify: Notify,
        shared: SharedTokens | None = None,
    ) -> None:
        self.subject = subject
        self.shared = shared
        """The tokens that both models of a comparison have; None if they are not compared."""
        self.architecture = subject.architecture
        self.placement = placement
        self.group = group
        self.notify = notify
        self.surgeries = {surgery.size_key: surgery for surgery in surgeries}
        """The surgery of each pruned model, by its size."""
        if subject.compared:
            self.surgeries = {OTHER: Surgery(self.architecture)}
        self.sizes = tuple(self.surgeries)
        self.one_at_a_time = self._must_take_turns()
        """Whether only one model is open at a time: no other can share packed, spread or streamed
        weights with it, or there is no memory for a second.
        """
        self._loaded: dict[SizeKey, SkippableModel] = {}

    def architecture_of(self, size: SizeKey) -> Architecture:
        """Return the model that a size is made of: in a comparison, the other one."""
        if size and self.subject.compared:
            return self.subject.compared
        return self.architecture

    def name(self, size: SizeKey) -> str:
        """Name a size's model in messages."""
        if self.subject.compared:
            return self.architecture_of(size).source.id
        if not size:
            return "dense model"
        return f"model {self.subject.order.describe(size)}"

    def own_tokens(self, size: SizeKey, tokens: Tokens) -> Tokens:
        """Return the dense model's tokens in the numbers of a size's model."""
        if self.shared and size and isinstance(tokens, Tensor):
            return self.shared.of_other(tokens)
        return tokens

    def alone(self) -> Models:
        """Return the other model of a comparison as a dense one."""
        _, other = self.subject.pair
        subject = Subject(Surgery(other), None)
        alone = Models(subject, (), self.placement, self.group, self.notify)
        alone._loaded[()] = self.without(OTHER)
        return alone

    def short_name(self, size: SizeKey) -> str:
        """Name a size's model in a line of progress."""
        if self.subject.compared:
            return self.architecture_of(size).source.name
        return f"{len(size)} removed" if size else "dense"

    def tokenizer(self, size: SizeKey) -> Any:
        """Return the tokenizer of a size's model."""
        return load_tokenizer(self.architecture_of(size).source)

    def without(self, removals: SizeKey) -> SkippableModel:
        """Return the model of one of `sizes`, or the dense one.

        If they share no weights, it replaces the last one.
        """
        if removals not in self._loaded:
            if self.one_at_a_time:
                self._loaded.clear()
                free_memory()
            self._loaded[removals] = self._load(removals)
        return self._loaded[removals]

    @property
    def differ_in_blocks_alone(self) -> bool:
        """Whether each size is the dense model without some of its blocks."""
        return not self.subject.other and not any(
            surgery.other_cuts for surgery in self.surgeries.values()
        )

    @contextmanager
    def in_turn(self, sizes: Sequence[SizeKey]) -> Iterator[SharedPredictions | None]:
        """Let sizes that are predicted in turn share work; None if they have none in common."""
        if len(sizes) < 2 or not self.differ_in_blocks_alone or not self._runs_by_blocks:
            yield None
            return
        with self.without(()) as dense:
            yield SharedPredictions(dense, sizes, available_memory(CPU, self.group) // 2)

    @cached_property
    def _runs_by_blocks(self) -> bool:
        # Whether the dense model computes the same if its blocks run on their own.
        count = min(CHECKED_TOKENS, self.architecture.longest_sequence or CHECKED_TOKENS)
        tokens = torch.arange(count) % self.architecture.text_config.vocab_size
        # A model that is loaded in inference mode keeps tensors that refuse `requires_grad`.
        with self.without(()) as dense, torch.inference_mode():
            return why_not_fork(dense, tokens[None].to(dense.device)) is None

    def loaded_first(self, sizes: Sequence[SizeKey]) -> list[SizeKey]:
        """Sort these sizes so that as few models as possible are loaded."""
        return sorted(sizes, key=lambda removals: removals not in self._loaded)

    def _must_take_turns(self) -> bool:
        placement = self.placement
        if not self.subject.compared and (
            self.architecture.is_quantized or placement.device_map is not None or placement.stream
        ):
            return True
        return not placement.stream and self.group.from_main(self._are_too_large)

    def _are_too_large(self) -> bool:
        dtype = self.placement.dtype
        weights = model_bytes(self.architecture, dtype)
        if self.subject.compared:
            weights += model_bytes(self.subject.compared, dtype)
        elif self.subject.plan is None or self.subject.order.whole_blocks:
            return False
        else:
            # Blocks without some of their parts share little with the dense ones.
            weights *= 1 + len(self.sizes)
        return bool(memory_shortage(weights, self.placement.device))

    def _load(self, removals: SizeKey) -> SkippableModel:
        if not removals:
            return open_model(self.architecture, self.placement, self.notify)
        if self.subject.other:
            return open_model(self.subject.other, self.placement, self.notify)
        dense = None if self.one_at_a_time else self.without(()).model
        model = load_pruned(self.surgeries[removals], self.placement, self.notify, dense=dense)
        ending = ending_of(self.architecture, self.placement.device)
        return SkippableModel(model, self.architecture.blocks_of(model), ending=ending)

    def require_unchanged(self) -> None:
        """Raise a ModelError if the models' files have changed since they were first read."""
        for architecture in filter(None, (self.architecture, self.subject.other)):
            architecture.source.watch.require_unchanged()
