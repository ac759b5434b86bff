"""`sleb apply --heal`: train the kept blocks to predict what the dense model predicts, within a
budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery.distillation import Distillation
from sleb_cli.engine.recovery.heal_budget import HealBudget
from sleb_cli.engine.recovery.low_rank import RANK, LowRank, rank_of, trained_numbers
from sleb_cli.engine.recovery.stage import Fields, Job, Stage, kept_blocks
from sleb_cli.engine.recovery.training import LEARNING_RATE, Training
from sleb_cli.engine.recovery.unfinished import DIGITS
from sleb_cli.engine.recovery.variant import Variant
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import HEAL_TASK, task
from sleb_cli.keys import name_of
from sleb_cli.plan import HealRecord
from sleb_plugins import UnsupportedModelError

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense
model's inputs.
"""
SHARING_TOLERANCE = 1e-2

TRAINING_BYTES = 32
"""Bytes per trained number, besides the models, in float32: its value, best value and two moments,
and in a step three of its gradient and what AdamW computes.
"""
SAVED_BYTES = 16
"""Bytes saved per trained number: its value, best value and two moments."""


@dataclass(frozen=True)
class Heal(Stage):
    """Training of the kept blocks within a budget."""

    budget: HealBudget

    title, model, measured, streams = "Healing", "healed", "healed", False

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of the trained weights, and of the training's state."""
        # Both models share the original values, and all else.
        weights = sum(
            parameter.numel() for block in kept_blocks(surgery) for parameter in block.parameters()
        )
        state = _max_trained_numbers(kept_blocks(surgery)) * TRAINING_BYTES
        return {"the trained weights": weights * dtype.itemsize, "the state of training": state}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of the saved training at most."""
        return _max_trained_numbers(kept_blocks(surgery)) * SAVED_BYTES

    def run(self, job: Job, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Fields]:
        """Distill the dense model into the pruned one with these values."""
        surgery, budget = job.settings.surgery, self.budget
        architecture = surgery.architecture
        model, parameters = _student(job, values)
        with SkippableModel(model, architecture.blocks_of(model)) as pruned:
            first = _first_trained(job, pruned, values)
            names = architecture.block_names(surgery.kept)
            weights = {
                name: parameter
                for name, parameter in parameters.items()
                if rank_of(parameter.shape) and (names.block_of(name) or 0) >= first
            }
            originals = _detach_from_originals(job, [*weights.values()])
            trained = LowRank([*weights.values()], originals, job.settings.stored)
            distillation = Distillation(Variant(job.dense), Variant(pruned), first)
            file = job.saved / f"healing-{self._identity(job)}.safetensors"
            unit = "tokens" if budget.tokens is not None else "s"
            with task(job.notify, HEAL_TASK, budget.total, unit) as advance:
                training = Training(job, budget, distillation, trained, file, advance)
                stopped = training.run()
        progress = training.progress
        record = partial(
            HealRecord,
            minutes=budget.minutes,
            token_budget=budget.tokens,
            sequence_length=job.validation.sequences.shape[1],
            batch_size=training.size * job.group.size,
            learning_rate=LEARNING_RATE,
            rank=RANK,
            kept_tokens=progress.best_tokens,
            stopped=stopped,
            **progress.model_dump(include={"tokens", "steps", "seconds"}),
        )
        all_values = {**values, **{name: weight.detach() for name, weight in weights.items()}}
        return all_values, lambda losses: {"heal": record(losses=losses)}

    def _identity(self, job: Job) -> str:
        # The folder is named after all else that a healing depends on.
        text, stages = job.settings.splits[0], job.settings.stages
        depends = {
            "before": [stage.measured for stage in stages[: stages.index(self)]],
            "calibration": text.source,
            "samples": text.samples,
            "seed": text.seed,
            "minutes": self.budget.minutes,
            "tokens": self.budget.tokens,
            "processes": job.group.size,
        }
        return name_of(depends)[:DIGITS]


def _max_trained_numbers(blocks: Sequence[nn.Module]) -> int:
    # Blocks well before the gap are not trained.
    return sum(
        trained_numbers(parameter.shape) for block in blocks for parameter in block.parameters()
    )


def _student(job: Job, values: Mapping[str, Tensor]) -> tuple[Any, dict[str, nn.Parameter]]:
    surgery, placement = job.settings.surgery, job.settings.placement
    path = surgery.architecture.adapter.blocks_path
    model = load_pruned(surgery, placement, job.notify, dense=job.dense.model)
    # Names number the blocks as in the dense model.
    parameters = {
        f"{path}.{old}.{name}": parameter
        for block, old in zip(
            surgery.architecture.blocks_of(model), surgery.kept.blocks, strict=True
        )
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point()
    }
    for name, value in values.items():  # outside the blocks, the names are the same in both models
        parameter = parameters[name] if name in parameters else model.get_parameter(name)
        parameter.data = value.to(
            parameter.device, parameter.dtype, copy=True
        )  # not into the dense model's own
    return model, parameters


def _first_trained(job: Job, pruned: SkippableModel, values: Mapping[str, Tensor]) -> int:
    surgery, ids = (
        job.settings.surgery,
        job.validation.sequences[:1].to(job.settings.placement.device),
    )
    names = surgery.architecture.block_names(surgery.kept)
    changed = [block for block in map(names.block_of, values) if block is not None]
    first = max(0, min([min(surgery.removed) - TRAINED_BELOW, *changed]))
    return first if first and can_share(Variant(job.dense), Variant(pruned), first, ids) else 0


def _detach_from_originals(job: Job, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    # The student shares memory with the dense model where nothing was fitted: that stays, and the
    # weights move out.
    originals = [weight.data for weight in weights]
    for weight, original in zip(weights, originals, strict=True):
        # Each process fitted its own weights, and rounding may differ between them.
        weight.data = job.group.broadcast(original.clone())
        if not torch.equal(original, weight.data):
            original.copy_(weight.data)
    return originals


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Check that the pruned model, started at block `first` with the dense model's hidden states,
    computes the same.
    """
    # It does not if blocks take more than hidden states from earlier blocks.
    try:
        entering, _ = dense.entering_and_final_states(ids, first)
        shared, expected = pruned.final_states(ids, (first, entering)), pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    return float((shared - expected).float().norm() / expected.float().norm()) < SHARING_TOLERANCE
