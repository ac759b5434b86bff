"""Hidden states of the dense and of the recovered model at one depth, on batches of the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb_cli.engine.forward.stores import SharedInputs, keep_on_device, to_cpu
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.variant import Variant, run_blocks, summed_losses
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins import ModelError

JUDGED_POSITIONS = 1024
"""About how many positions compare two fits."""
PROBED_TOKENS = 512
"""Enough to tell what a block's modules do."""


@dataclass(frozen=True)
class DepthPair:
    """Hidden states of both models at one depth, batch by batch."""

    dense: Sequence[Tensor]
    pruned: Sequence[Tensor]


class Batches:
    """The batches of the training text, then of the validation text.

    Attributes:
        ids: the tokens of each batch.
        calls: the calls of the blocks on each batch.
        probe: the calls of the blocks on a few sequences of the first batch.
        train: the numbers of the training batches.
        validation: the numbers of the validation batches.
        train_for_gains: the training batches that gains are fitted to, which are few numbers.
        judged: the validation batches that two fits are compared on.
        final_norm_needs: the batches that the final norm is found on and fitted to.
    """

    def __init__(self, job: Job, size: int) -> None:
        self.skippable = job.dense
        self.to_store = to_cpu if job.settings.on_host else keep_on_device
        device = self.skippable.device
        train = torch.split(job.train.sequences.to(device), size)
        validation = torch.split(job.validation.sequences.to(device), size)
        self.ids = [*train, *validation]
        shared = SharedInputs(self.skippable, self.to_store)
        self.calls = [shared.calls(ids) for ids in self.ids]
        probed = max(1, PROBED_TOKENS // job.validation.sequences.shape[1])
        self.probe = shared.calls(self.ids[0][:probed])
        self.train = range(len(train))
        self.validation = range(len(train), len(self.ids))
        self.train_for_gains = _first_and_middle(self.train)
        self.judged = _first_and_middle(self.validation)
        self.final_norm_needs = [*self.train_for_gains, *self.validation]

    def entering(self) -> list[Tensor]:
        """Return the hidden states that enter the first block."""
        return [calls[0].entering for calls in self.calls]

    def run(self, states: Sequence[Tensor], blocks: Iterable[int]) -> list[Tensor]:
        """Run these blocks on all batches, reading weights once."""
        return run_blocks(self.skippable, blocks, self.calls, states, self.to_store)

    def run_judged(self, states: Sequence[Tensor], blocks: Iterable[int]) -> list[Tensor]:
        """Run these blocks on the judged batches; return the hidden states of these."""
        calls = [self.calls[batch] for batch in self.judged]
        judged = [states[batch] for batch in self.judged]
        return run_blocks(self.skippable, blocks, calls, judged, self.to_store)

    def run_both(
        self, pair: DepthPair, blocks: Iterable[int], chosen: Iterable[int] | None = None
    ) -> DepthPair:
        """Run these blocks in both models, reading weights once, on all batches or the chosen ones.

        The states of other batches come back as they were.
        """
        batches = range(len(self.ids)) if chosen is None else chosen
        dense = list(pair.dense)
        pruned = list(pair.pruned)
        order = list(blocks)
        with self.skippable.weights.visit(order) as visit:
            for block in order:
                visit.load(block)
                for batch in batches:
                    call = self.calls[batch][block]
                    for states in (dense, pruned):
                        leaving = self.skippable.run_block(call, states[batch])
                        states[batch] = self.to_store(leaving)
        return DepthPair(dense, pruned)


def _first_and_middle(batches: range) -> list[int]:
    if len(batches) <= 4:
        return [batches[0]]
    middle = max(4, len(batches) // 2)
    return [batches[0], batches[middle]]


class Judge:
    """Measures the divergence from the dense model on some of the validation text."""

    def __init__(self, job: Job, batches: Batches, size: int) -> None:
        self.batches = batches
        self.removed = job.settings.surgery.removed
        self.dense = Variant(batches.skippable)
        blocks = range(len(batches.skippable.switches))
        self.dense_final = batches.run_judged(batches.entering(), blocks)
        sequences = job.validation.sequences
        mask = whole_mask(sequences, job.validation.loss_mask)
        counted = torch.split(mask.to(batches.skippable.device), size)
        first = batches.validation[0]
        self.counted = [counted[batch - first] for batch in batches.judged]
        judged = min(len(sequences), size * len(batches.judged))
        positions = judged * (sequences.shape[1] - 1)
        self.every = max(1, positions // JUDGED_POSITIONS)

    def divergence(
        self, pruned: Sequence[Tensor], block: int | None, values: Mapping[str, Tensor]
    ) -> float:
        """Return the divergence with these values, given the pruned states that enter `block`.

        A `block` of None is the final norm.
        """
        skippable = self.batches.skippable
        model = Variant(skippable, self.removed, values)
        kept_blocks: list[int] = []
        if block is not None:
            later = range(block, len(skippable.switches))
            kept_blocks = [number for number in later if number not in self.removed]
        with skippable.replaced(values):
            final = self.batches.run_judged(pruned, kept_blocks)
        models = (model, self.dense)
        total = 0.0
        count = 0
        for number, batch in enumerate(self.batches.judged):
            states = (final[number], self.dense_final[number])
            ids = self.batches.ids[batch]
            counted = self.counted[number]
            summed = summed_losses(models, states, ids, counted, self.every)
            total += summed.divergence
            count += int(counted[:, 1 :: self.every].sum())
        return total / max(1, count)


def require_finite(tensors: Iterable[Tensor]) -> None:
    """Raise a ModelError unless these hidden states, or sums over them, are finite."""
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise ModelError(
                "On the text to recover on, the model computes hidden states that are not finite "
                "numbers.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or "
                "float32.",
            )
