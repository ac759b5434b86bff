"""The hidden states at one depth of the dense and of the recovered model, and what a fit reads of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.holding import SharedInputs
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.least_squares import Ridge
from sleb_cli.engine.recovery.residual_projections import ResidualProjection, passing
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.windows import whole_mask
from sleb_plugins import ModelError

GAINS_SHARE = 4
"""Gains, one number for each channel, are fitted to the first batch of every fourth group."""
VALIDATION_POSITIONS = 2048
"""About how many positions compare two fits."""
PROBED_TOKENS = 512
"""Enough to tell what a block's modules do."""
GROUPS = 8
"""A text's batches are summed in this many groups, in order, so that sums do not depend on the number of processes."""

Samples = Iterator[tuple[Tensor, Tensor, Tensor]]
"""The features [positions, features], targets [positions, outputs] and weights [positions], batch by batch."""


class States:
    """The hidden states at one depth of the dense and of the recovered model, on this process's batches of the text."""

    def __init__(
        self,
        skippable: SkippableModel,
        removed: frozenset[int],
        train: Tensor,
        validation: Calibration,
        batch: int,
        group: ProcessGroup,
        *,
        on_host: bool,
    ) -> None:
        self.skippable, self.removed, self.group, self.on_host = skippable, removed, group, on_host
        self.count = len(skippable.switches)
        train_ids, self.train = self._take(train, batch)
        count, length = validation.sequences.shape
        validation_ids, self.validation = self._take(validation.sequences, batch, len(train_ids))
        self.ids, self.decides = train_ids + validation_ids, slice(len(train_ids), None)
        shared = SharedInputs(skippable, self.held)
        self.calls = [shared.calls(ids) for ids in self.ids]
        self.probed = slice(max(1, PROBED_TOKENS // length))
        self.probes = [shared.calls(ids[self.probed]) for ids in self.ids[:1]]
        self.dense = [calls[0].entering for calls in self.calls]
        self.pruned = self.dense
        self.dense_final = self.leaving(self.calls[self.decides], self.dense[self.decides], range(self.count))
        every = max(1, count * (length - 1) // VALIDATION_POSITIONS)
        self.positions = torch.arange(0, length - 1, every, device=skippable.device)
        counted = whole_mask(validation.sequences, validation.loss_mask)
        self.masks, _ = self._take(counted, batch)
        self.compared = max(1, int(counted[:, self.positions.cpu() + 1].sum()))

    def _take(self, text: Tensor, batch: int, begin: int = 0) -> tuple[list[Tensor], list[range]]:
        """Return this process's batches, the first number `begin`, and where each group's are: maybe nowhere."""
        batches, mine, taken = torch.split(text, batch), list[Tensor](), list[range]()
        bounds = [len(batches) * number // GROUPS for number in range(GROUPS + 1)]
        for number, (first, last) in enumerate((a, b) for a, b in pairwise(bounds) if a < b):
            start = begin + len(mine)
            if number % self.group.size == self.group.rank:
                mine += [part.to(self.skippable.device) for part in batches[first:last]]
            taken.append(range(start, begin + len(mine)))
        return mine, taken

    def held(self, tensor: Tensor) -> Tensor:
        """Return a tensor where it stays until it is needed."""
        return tensor.to(CPU) if self.on_host else tensor

    def leaving(
        self, calls: Sequence[list[Call]], entering: Sequence[Tensor], blocks: range, removed: Collection[int] = ()
    ) -> list[Tensor]:
        """Return what leaves the last of these blocks, batch by batch; each block's weights are read once for all."""
        states = list(entering)
        if states:
            for block in self.skippable.weights.visit(block for block in blocks if block not in removed):
                for batch, of_batch in enumerate(calls):
                    states[batch] = self.held(self.skippable.run_block(of_batch[block], states[batch]))
        return states

    @property
    def train_for_gains(self) -> list[range]:
        """Where the batches are that gains are fitted to, by group."""
        return [at[: number % GAINS_SHARE == 0] for number, at in enumerate(self.train)]

    @property
    def read_for_gains(self) -> list[int]:
        """The batches that the gains of the final norm are fitted to, and those that decide."""
        fitted = {at for group in self.train_for_gains for at in group}
        return sorted(fitted | {*range(min(1, len(self.ids))), *range(self.decides.start, len(self.ids))})

    def advance(self, blocks: range, batches: Sequence[int] | None = None) -> None:
        """Let both models' states pass through these blocks, on all batches or only on some."""
        chosen = range(len(self.calls)) if batches is None else batches
        calls, both = [self.calls[at] for at in chosen], ([*self.dense], [*self.pruned])
        left = iter(self.leaving(calls * 2, [states[at] for states in both for at in chosen], blocks))
        for states in both:
            for at in chosen:
                states[at] = next(left)
        self.dense, self.pruned = both

    def require_finite(self, tensors: Iterable[Tensor]) -> None:
        """Make sure that hidden states, or the sums over them, are finite numbers.

        Raises:
            ModelError: some are not.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ModelError(
                "On the text to recover on, the model computes hidden states that are not finite numbers.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or float32.",
            )

    def divergence(self, block: int, values: Mapping[str, Tensor]) -> float:
        """Return the divergence with these values on the validation text, from the pruned states that enter `block`."""
        dense, recovered = Variant(self.skippable), Variant(self.skippable, self.removed, values)
        blocks, here = range(block, self.count), self.decides
        with self.skippable.replaced(values):
            final = self.leaving(self.calls[here], self.pruned[here], blocks, self.removed)
        mine = iter(
            summed_losses(recovered, dense, ours, theirs, ids, self.positions, mask).divergence
            for ours, theirs, ids, mask in zip(final, self.dense_final, self.ids[here], self.masks, strict=True)
        )
        groups = {number: list(islice(mine, len(at))) for number, at in enumerate(self.validation) if at}
        found = sorted(item for of_process in self.group.gather(groups) for item in of_process.items())
        return sum(total for _, totals in found for total in totals) / self.compared

    def samples(
        self,
        batches: Iterable[int],
        block: int,
        projections: Sequence[ResidualProjection],
        values: Mapping[str, Tensor],
    ) -> Samples:
        """Yield features, what is missing at the end of the gap, and weights, in float32.

        Norms divide hidden states by their size before anything reads them, so an error is weighed relative to that
        size: otherwise the few positions whose states are a thousand times larger, often the first, would decide.
        """
        module = self.skippable.switches[block].block
        names = [name for projection in projections for name in projection.names]
        scales = [projection.scale for projection in projections if projection.takes_bias]
        for batch in batches:
            with self.skippable.replaced(values), passing(module, names) as (entering, _):
                found = self.skippable.run_block(self.calls[batch][block], self.pruned[batch]).float()
                wanted = self.dense[batch].to(found.device).float()
                missing = (wanted - found).flatten(0, -2)
                parts = [projection.features(module, entering) for projection in projections]
            ones = [missing.new_full((len(missing), 1), scale) for scale in scales[:1]]
            weights = 1 / wanted.square().mean(-1).flatten().clamp_min(1e-12)
            yield torch.cat([*parts, *ones], dim=1), missing, weights

    def samples_of_norm(self, batches: Iterable[int], norm: ResidualProjection) -> Samples:
        """Yield the same for the final norm, whose output is normalized already, so all positions weigh the same."""
        model, here = self.skippable.model, self.skippable.device
        module = model.get_submodule(norm.name)
        for batch in batches:
            dense, pruned = self.dense[batch].to(here), self.pruned[batch].to(here)
            wanted, found = (module(states).float().flatten(0, -2).to(here) for states in (dense, pruned))
            yield norm.normalized(model, pruned), wanted - found, torch.ones(len(found), device=here)

    def sums(
        self, samples: Callable[[Iterable[int]], Samples], groups: Sequence[range], empty: Callable[[], Ridge]
    ) -> Ridge:
        """Return the sums over all batches of all processes."""
        total, size, rank = empty(), self.group.size, self.group.rank
        for first in range(0, len(groups), size):
            turn, own = groups[first : first + size], empty()
            for features, targets, weights in samples(turn[rank]) if rank < len(turn) else ():
                own.add(features, targets, weights)
            for source in range(len(turn)):
                part = own if source == rank else empty()
                for sum_, added in zip(total.tensors, part.tensors, strict=True):
                    sum_ += self.group.broadcast(added, source)
        return total
