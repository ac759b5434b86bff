"""`sleb apply --heal`: train what stays towards the dense model, within a budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery.language import Distillation, LanguageSet
from sleb_cli.engine.recovery.outputs import OutputSet
from sleb_cli.engine.recovery.saved_state import DIGITS
from sleb_cli.engine.recovery.stage import Job, Stage, kept_blocks
from sleb_cli.engine.recovery.training import HealBudget, Progress, Training, TransferSet
from sleb_cli.engine.recovery.variant import Variant
from sleb_cli.engine.recovery.weights import (
    RANK,
    FlatWeights,
    LowRank,
    RelativeWeights,
    WholeWeights,
    trained_numbers,
)
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import HEAL_TASK, task
from sleb_cli.keys import name_of
from sleb_cli.plan import HealRecord, LossesRecord
from sleb_plugins import UnsupportedModelError

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense
model's inputs.
"""
SHARING_TOLERANCE = 1e-2

TRAINING_BYTES = 20
"""Bytes per trained number, besides the models, in float32: its value, best value, gradient and two
moments.
"""
SAVED_BYTES = 16
"""Bytes saved per trained number: its value, best value and two moments."""


@dataclass(frozen=True)
class Heal(Stage):
    """Training of the kept blocks within a budget: of a language model, by low-rank changes.

    Attributes:
        rate: the highest learning rate; steps are relative to the size of each weight
            (`weights.py`).
        rank: of the changes; None if all numbers are trained.
    """

    budget: HealBudget
    rate: ClassVar[float] = 1.5e-3
    rank: ClassVar[int | None] = RANK

    title = "Healing"
    task = HEAL_TASK
    model = "healed"
    key = "healed"
    streams = False

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of the trained weights, and of the training's state."""
        # Both models share the original values, and all else.
        weights = sum(math.prod(shape) for shape, _ in self._may_train(surgery))
        state = self._max_trained_numbers(surgery) * TRAINING_BYTES
        return {"the trained weights": weights * dtype.itemsize, "the state of training": state}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of the saved training at most."""
        return self._max_trained_numbers(surgery) * SAVED_BYTES

    def run(
        self, job: Job, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], _EndedTraining]:
        """Distill the dense model into the pruned one with these values."""
        architecture = job.settings.surgery.architecture
        names = architecture.block_names(job.settings.surgery.kept)
        model, simulated = self.student(job)
        parameters = _give_values(job, model, values)
        blocks = architecture.blocks_of(model)
        with SkippableModel(model, blocks, ending=job.dense.ending) as pruned, simulated:
            first = self.first_trained(job, pruned, values)
            weights: dict[str, nn.Parameter] = {}
            for name, parameter in parameters.items():
                block, inner = names.split(name)
                if (block or 0) >= first and self.trained_numbers(inner, parameter.shape):
                    weights[name] = parameter
            trained = self.trained(job, list(weights.values()))
            texts = self.texts(job, pruned, first)
            unit = "s" if self.budget.tokens is None else "tokens"
            with task(job.notify, HEAL_TASK, self.budget.total, unit) as advance:
                training = Training(
                    job, self.budget, texts, trained, self.rate, self._name_in_state(job), advance
                )
                stopped = training.run()
        stored = job.settings.stored
        healed = {name: weight.detach().to(stored) for name, weight in weights.items()}
        length = job.validation.sequences.shape[1]
        done = _EndedTraining(length, texts.size, training.progress, stopped)
        return {**values, **healed}, done

    def fields(self, done: _EndedTraining, losses: LossesRecord) -> dict[str, Any]:
        """Return the record of the training."""
        progress = done.progress
        record = HealRecord(
            minutes=self.budget.minutes,
            token_budget=self.budget.tokens,
            sequence_length=done.sequence_length,
            batch_size=done.batch_size,
            learning_rate=self.rate,
            rank=self.rank,
            tokens=progress.tokens,
            kept_tokens=progress.best_tokens,
            steps=progress.steps,
            seconds=progress.seconds,
            stopped=done.stopped,
            losses=losses,
        )
        return {"heal": record}

    def _name_in_state(self, job: Job) -> str:
        # The file is named after all else that a healing depends on.
        text = job.settings.splits[0]
        stages = job.settings.stages
        depends = {
            "before": [stage.key for stage in stages[: stages.index(self)]],
            "calibration": text.source,
            "samples": text.samples,
            "seed": text.seed,
            "minutes": self.budget.minutes,
            "tokens": self.budget.tokens,
        }
        return f"healing {name_of(depends)[:DIGITS]}"

    def student(self, job: Job) -> tuple[Any, AbstractContextManager[object]]:
        """Return the model to train, and the context in which it computes as the pruned one."""
        settings = job.settings
        dense = job.dense.model
        model = load_pruned(settings.surgery, settings.placement, job.notify, dense=dense)
        return model, nullcontext()

    def trained_numbers(self, name: str, shape: Sequence[int]) -> int:
        """Count the numbers that are trained for a weight of this name in its block."""
        return trained_numbers(shape)

    def first_trained(self, job: Job, pruned: SkippableModel, values: Mapping[str, Tensor]) -> int:
        """Return the block that training begins at."""
        return _first_trained(job, pruned, values)

    def trained(self, job: Job, weights: Sequence[nn.Parameter]) -> FlatWeights:
        """Make the numbers that move these weights."""
        # The student shares memory with the dense model where nothing was fitted: that stays, and
        # the weights move out.
        originals = [weight.data for weight in weights]
        for weight in weights:
            weight.data = weight.data.clone()
        return LowRank(weights, originals, job.settings.stored)

    def texts(self, job: Job, pruned: SkippableModel, first: int) -> TransferSet:
        """Return the text to train on, and the distillation on it."""
        return LanguageSet(job, Distillation(Variant(job.dense), Variant(pruned), first))

    def _max_trained_numbers(self, surgery: Surgery) -> int:
        return sum(numbers for _, numbers in self._may_train(surgery))

    def _may_train(self, surgery: Surgery) -> list[tuple[Sequence[int], int]]:
        """Return the shape of each weight that may be trained, and its trained numbers."""
        # Blocks well before the gap are not trained.
        weights: list[tuple[Sequence[int], int]] = []
        for block in kept_blocks(surgery):
            for name, parameter in block.named_parameters():
                numbers = self.trained_numbers(name, parameter.shape)
                if numbers:
                    weights.append((parameter.shape, numbers))
        return weights


@dataclass(frozen=True)
class HealReader(Heal):
    """Training of all weights of the blocks, of a model that only reads."""

    rate: ClassVar[float] = 1e-4
    rank: ClassVar[int | None] = None

    def trained_numbers(self, name: str, shape: Sequence[int]) -> int:
        """Count the numbers of a weight."""
        return math.prod(shape)

    def first_trained(self, job: Job, pruned: SkippableModel, values: Mapping[str, Tensor]) -> int:
        """Begin at the first block: nothing is shared."""
        return 0

    def trained(self, job: Job, weights: Sequence[nn.Parameter]) -> FlatWeights:
        """Make the numbers that move these weights."""
        return WholeWeights(weights)

    def texts(self, job: Job, pruned: SkippableModel, first: int) -> TransferSet:
        """Return the text to train on, with the dense model's outputs."""
        return OutputSet(job, pruned)


@dataclass(frozen=True)
class HealRouters(Heal):
    """Training of routers, so that they choose among the experts that stay.

    Attributes:
        routers: the names of their tensors in a block.
    """

    routers: Collection[str]
    rate: ClassVar[float] = 3e-2
    rank: ClassVar[int | None] = None

    def student(self, job: Job) -> tuple[Any, AbstractContextManager[object]]:
        """Return a second dense model on the same weights, whose routers choose no removed one."""
        surgery = job.settings.surgery
        whole = Surgery(surgery.architecture)
        model = load_pruned(whole, job.settings.placement, job.notify, dense=job.dense.model)
        return model, surgery.simulate(model)

    def trained_numbers(self, name: str, shape: Sequence[int]) -> int:
        """Count the numbers of a router's weight, with those of experts that go."""
        return math.prod(shape) if name in self.routers else 0

    def first_trained(self, job: Job, pruned: SkippableModel, values: Mapping[str, Tensor]) -> int:
        """Begin at the first block: most have experts."""
        return 0

    def trained(self, job: Job, weights: Sequence[nn.Parameter]) -> FlatWeights:
        """Make the numbers that move these weights."""
        return RelativeWeights(weights, job.settings.stored)


@dataclass(frozen=True)
class _EndedTraining:
    """A training that has ended."""

    sequence_length: int
    batch_size: int
    progress: Progress
    stopped: Literal["budget", "patience"]


def _give_values(job: Job, model: Any, values: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Give the student these values; return its blocks' parameters by dense names."""
    surgery = job.settings.surgery
    path = surgery.architecture.adapter.blocks_path
    blocks = surgery.architecture.blocks_of(model)
    parameters: dict[str, nn.Parameter] = {}
    for block, old in zip(blocks, surgery.kept.blocks, strict=True):
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point():
                parameters[f"{path}.{old}.{name}"] = parameter
    for name, value in values.items():
        # Outside the blocks, the names are the same in both models.
        parameter = parameters[name] if name in parameters else model.get_parameter(name)
        # A copy, so that the dense model's own value stays.
        parameter.data = value.to(parameter.device, parameter.dtype, copy=True)
    return parameters


def _first_trained(job: Job, pruned: SkippableModel, values: Mapping[str, Tensor]) -> int:
    surgery = job.settings.surgery
    names = surgery.architecture.block_names(surgery.kept)
    first = min(surgery.removed) - TRAINED_BELOW
    for name in values:
        block = names.block_of(name)
        if block is not None:
            first = min(first, block)
    if first <= 0:
        return 0
    ids = job.validation.sequences[:1].to(job.settings.placement.device)
    return first if can_share(Variant(job.dense), Variant(pruned), first, ids) else 0


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Check that the pruned model computes the same from the dense states before block `first`."""
    # It does not if blocks take more than hidden states from earlier blocks.
    try:
        entering, _ = dense.entering_and_final_states(ids, first)
        shared = pruned.final_states(ids, (first, entering))
        expected = pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    difference = (shared - expected).float().norm()
    return float(difference / expected.float().norm()) < SHARING_TOLERANCE
