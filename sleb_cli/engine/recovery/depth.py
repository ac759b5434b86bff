"""The hidden states at one depth of the dense and of the recovered model, on this process's batches
of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sleb_cli.engine.forward.stores import SharedInputs, keep_on_device, to_cpu
from sleb_cli.engine.process_group import join_dealt
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.variant import Variant, run_blocks, summed_losses
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins import ModelError

GAINS_SHARE = 4
"""Gains, one number for each channel, are fitted to the first batch of every fourth group."""
JUDGED_SHARE = 4
"""Two fits are compared on the first batch of every fourth group of those that decide."""
JUDGED_POSITIONS = 1024
"""About how many positions compare two fits."""
PROBED_TOKENS = 512
"""Enough to tell what a block's modules do."""
GROUPS = 8
"""A text's batches are summed in this many groups, in order, so that sums do not depend on the
number of processes.
"""


@dataclass(frozen=True)
class DepthPair:
    """Hidden states of both models at one depth, batch by batch."""

    dense: Sequence[Tensor]
    pruned: Sequence[Tensor]


class Batches:
    """The batches of this process: the training text's, then the validation text's, which decide.

    Attributes:
        train: the range of each group of training batches; empty if another process has it.
        validation: the range of each group of validation batches.
        calls: the calls of the blocks on each batch.
        probes: the calls of the blocks on a few sequences of the first batch, if there is one.
        train_for_gains: the range in each group of training batches that gains are fitted to.
        judged: the range in each group of validation batches that two fits are compared on.
    """

    def __init__(self, job: Job, size: int) -> None:
        self.skippable, self.group = job.dense, job.group
        self.to_store = to_cpu if job.settings.on_host else keep_on_device
        train_ids, self.train = self.share(job.train.sequences, size)
        validation_ids, self.validation = self.share(job.validation.sequences, size, len(train_ids))
        self.ids = train_ids + validation_ids
        shared = SharedInputs(self.skippable, self.to_store)
        self.calls = [shared.calls(ids) for ids in self.ids]
        probed = max(1, PROBED_TOKENS // job.validation.sequences.shape[1])
        self.probes = [shared.calls(ids[:probed]) for ids in self.ids[:1]]
        self.all = range(len(self.ids))
        self.deciding = range(len(train_ids), len(self.ids))
        self.train_for_gains = [
            at[: number % GAINS_SHARE == 0] for number, at in enumerate(self.train)
        ]
        self.judged = [
            at[: number % JUDGED_SHARE == 0] for number, at in enumerate(self.validation)
        ]

    def share(self, text: Tensor, size: int, begin: int = 0) -> tuple[list[Tensor], list[range]]:
        """Return this process's batches of a text, numbered from `begin`, and the range of each
        group.
        """
        batches, mine, groups = torch.split(text, size), list[Tensor](), list[range]()
        bounds = [len(batches) * number // GROUPS for number in range(GROUPS + 1)]
        for number, (first, last) in enumerate((a, b) for a, b in pairwise(bounds) if a < b):
            start = begin + len(mine)
            if number % self.group.size == self.group.rank:
                mine += [batch.to(self.skippable.device) for batch in batches[first:last]]
            groups.append(range(start, begin + len(mine)))
        return mine, groups

    def run_blocks(
        self, entering: Sequence[Tensor], blocks: Iterable[int], chosen: Sequence[int]
    ) -> list[Tensor]:
        """Run these blocks on the chosen batches, reading weights once; return the hidden states of
        all batches.

        The states may be two models', one after the other: numbers go on from the first's batches
        to the second's.
        """
        states = list(entering)
        if chosen:
            calls = [self.calls[at % len(self.calls)] for at in chosen]
            leaving = run_blocks(
                self.skippable, blocks, calls, [states[at] for at in chosen], self.to_store
            )
            for at, hidden in zip(chosen, leaving, strict=True):
                states[at] = hidden
        return states

    def entering(self, block: int) -> DepthPair:
        """Return the hidden states that enter a block before which none is removed."""
        states = self.run_blocks(
            [calls[0].entering for calls in self.calls], range(block), self.all
        )
        return DepthPair(states, states)

    def advance(self, pair: DepthPair, blocks: range, *, only_for_gains: bool = False) -> DepthPair:
        """Run these blocks in both models, on all batches or only where the final norm is fitted."""
        fitted = {at for group in self.train_for_gains for at in group}
        # The first batch finds the norm.
        chosen = sorted(fitted.union(self.all[:1], self.deciding)) if only_for_gains else self.all
        both = [*chosen, *(len(self.all) + at for at in chosen)]
        states = self.run_blocks([*pair.dense, *pair.pruned], blocks, both)
        return DepthPair(states[: len(self.all)], states[len(self.all) :])


class Judge:
    """Measures the recovered model's divergence from the dense one on some of the validation text."""

    def __init__(self, job: Job, batches: Batches, size: int) -> None:
        self.batches, self.removed = batches, job.settings.surgery.removed
        self.judged = [at for group in batches.judged for at in group]
        entering, blocks = (
            [calls[0].entering for calls in batches.calls],
            range(len(batches.skippable.switches)),
        )
        self.dense_final = batches.run_blocks(entering, blocks, self.judged)
        count, length = job.validation.sequences.shape
        judged = min(count, size * math.ceil(len(batches.validation) / JUDGED_SHARE))
        self.every = max(1, judged * (length - 1) // JUDGED_POSITIONS)
        counted, _ = batches.share(
            whole_mask(job.validation.sequences, job.validation.loss_mask), size
        )
        self.counted = dict(zip(batches.deciding, counted, strict=True))

    def divergence(
        self, pruned: Sequence[Tensor], block: int, values: Mapping[str, Tensor]
    ) -> float:
        """Return the divergence with these values, given the pruned model's hidden states that
        enter `block`.
        """
        batches, skippable = self.batches, self.batches.skippable
        models = Variant(skippable, self.removed, values), Variant(skippable)
        blocks = [at for at in range(block, len(skippable.switches)) if at not in self.removed]
        with skippable.replaced(values):
            final = batches.run_blocks(pruned, blocks, self.judged)

        def compare(at: int) -> tuple[float, int]:
            states, counted = (final[at], self.dense_final[at]), self.counted[at]
            losses = summed_losses(models, states, batches.ids[at], counted, self.every)
            return losses.divergence, int(counted[:, 1 :: self.every].sum())

        group = batches.group
        own_sums = [
            [compare(at) for at in of_group]
            for of_group in batches.judged[group.rank :: group.size]
        ]
        # Sums are in the order of groups, so that they do not depend on the number of processes.
        sums = [
            of_batch for of_group in join_dealt(group.gather(own_sums)) for of_batch in of_group
        ]
        return sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))


def require_finite(tensors: Iterable[Tensor]) -> None:
    """Raise a ModelError unless these hidden states, or sums over them, are finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ModelError(
            "On the text to recover on, the model computes hidden states that are not finite "
            "numbers.",
            hint="Use other text, or a data type with a wider range: --dtype bfloat16 or float32.",
        )
