"""`sleb search --unit experts`: one walk counts how texts use the experts, another measures the
model without some.

No subsets are searched: a sum over a text finds about the experts that an exact search on this text
finds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from sleb_cli.engine.cut.experts.expert_cut import ExpertCut
from sleb_cli.engine.cut.experts.routing import Routing, watch_routing
from sleb_cli.engine.device import dtype_name, hint_for_nonfinite
from sleb_cli.engine.files.shards import new_tensor
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import Job, Passes
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.experts import expert_parameters, find_experts
from sleb_cli.engine.process_group import deal
from sleb_cli.engine.search.held_out import hold_out
from sleb_cli.engine.search.inputs import (
    SearchInputs,
    make_plan,
    open_search_journal,
    search_record,
    write_sample,
)
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.losses import MAX_LOSS
from sleb_cli.engine.search.settings import ExpertMethod, Search
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify, task
from sleb_cli.plan import DenseRecord, ExpertOrder, ExpertPlan, ExpertsText, HeldOutRecord, Plan
from sleb_plugins import ExpertUse, ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PIECE_BYTES = 64 << 20
"""About the size of the outputs of single experts that exist at once."""

Sums = Tensor
"""The fields of `ExpertUse` of a block, float64 [6, experts]."""


@dataclass(frozen=True)
class SourceBatches:
    """One source's scored or held-out sequences, as batches of the passes."""

    source: str
    held_out: bool
    sequences: int
    batches: range


def search_experts(
    search: Search, method: ExpertMethod, inputs: SearchInputs, started: float
) -> Plan:
    """Choose which experts of each block go, and measure the model without them."""
    architecture, model = search.model.architecture, inputs.model
    unchanged = architecture.source.watch.unchanged
    with unchanged(), model, task(inputs.notify, "Checking the engine"):
        passes, texts, reason = _passes(search, inputs, method.holdout)
    record = search_record(
        search,
        passes,
        sum(text.sequences for text in texts if text.held_out),
        remove=method.fewer,
        target=method.target,
        protect_first=0,
        protect_last=0,
        engine="fork" if passes.forks else "plain",
        engine_reason=reason,
    )
    with (
        open_search_journal(search, inputs, record) as journal,
        unchanged(),
        model,
        torch.inference_mode(),
    ):
        scoring = _ExpertScoring(architecture, passes, texts, journal, inputs.notify)
        scoring.count_uses()
        orders = tuple(scoring.rank(method, block) for block in find_experts(architecture).blocks)
        removed = {order.block: order.removals for order in orders}
        cut = ExpertCut(find_experts(architecture).count, removed, architecture)
        with cut.simulate(model.model):
            scoring.measure(cut.size_key, f"Measuring without {cut.description}")
        sample = write_sample(search, inputs, (), cut.simulate(model.model))
    return make_plan(
        search,
        inputs,
        started,
        record,
        dense=scoring.dense_record(),
        removals=(),
        steps=(),
        experts=scoring.plan(orders, cut),
        sample_generation=sample,
    )


def _passes(
    search: Search, inputs: SearchInputs, holdout: float
) -> tuple[Passes, list[SourceBatches], str | None]:
    whole = inputs.calibration.to(inputs.model.device)
    prepared, reason = prepare_passes(
        inputs.model,
        whole.sequences,
        inputs.notify,
        loss_mask=whole.loss_mask,
        memory=partial(available_memory, group=inputs.group, limit=search.model.memory),
        batch_size=search.model.batch_size,
        walks_together=True,
    )
    texts, batches, masks = list[SourceBatches](), list[Tensor](), list[Tensor]()
    # Each batch belongs to one text.
    for is_held_out, calibration in enumerate(filter(None, hold_out(whole, holdout))):
        for source in dict.fromkeys(calibration.origins):
            ids, mask = calibration.sequences_of(source)
            first, size = len(batches), prepared.budget.sequences
            batches += torch.split(ids, size)
            masks += [] if mask is None else torch.split(mask, size)
            texts.append(
                SourceBatches(source, bool(is_held_out), len(ids), range(first, len(batches)))
            )
    budget = replace(prepared.budget, kept_branches=0)
    return replace(prepared, batches=batches, loss_mask=masks or None, budget=budget), texts, reason


@dataclass
class _ExpertScoring:
    """Measures losses and the use of experts, batch by batch; processes share the work, and the
    journal.
    """

    architecture: Architecture
    passes: Passes
    texts: Sequence[SourceBatches]
    journal: Journal
    notify: Notify
    sums: dict[int, dict[int, Sums]] = field(default_factory=lambda: defaultdict(dict), init=False)
    """The sums of the batches that run now, by block."""

    def count_uses(self) -> None:
        experts, model, current = find_experts(self.architecture), self.passes.skippable.model, 0

        def watch(batch: int | None) -> None:
            nonlocal current
            if batch is None:
                self.sums.clear()
            else:
                current = batch

        def add(block: int, routing: Routing) -> None:
            of_batch = self.sums[current]
            of_batch[block] = sum_expert_use(routing, experts.count) + of_batch.get(block, 0)

        self.passes.watch = watch
        with watch_routing(experts, [*self.architecture.blocks_of(model)], add):
            self.measure((), "Counting how experts are used")
        self.passes.watch = lambda batch: None

    def measure(self, removed: Sequence[int], title: str) -> None:
        missing = [
            batch
            for batch in self.passes.numbers
            if self.journal.find(removed, None, batch) is None
        ]
        group = self.journal.group
        if self.passes.skippable.weights.resident:
            turns = [*deal(missing, group.size)]
        else:  # a single turn reads streamed weights once
            turns = [[missing[rank :: group.size] for rank in range(group.size)]]
        sequences = sum(len(self.passes.batches[batch]) for batch in missing)
        with task(self.notify, title, sequences, "sequences") as advance:
            for turn in turns if missing else ():
                jobs: list[Job] = [(batch, ()) for batch in turn[group.rank]]
                for batch, _, losses in self.passes.score(
                    NegativeLogLikelihood(), (), jobs, advance=advance
                ):
                    self._record(batch, losses, removed)
                self.journal.exchange()

    def _record(self, batch: int, losses: list[float], removed: Sequence[int]) -> None:
        if not all(loss < MAX_LOSS for loss in losses):
            name, dtype = self.architecture.source.id, self.passes.skippable.model.dtype
            raise ModelError(
                f"{name} computes NaN, infinity or a perplexity that is not finite in "
                f"{dtype_name(dtype)}"
                f"{' without these experts' if removed else ''}.",
                hint=hint_for_nonfinite(dtype),
            )
        for block, sums in self.sums.pop(batch, {}).items():
            self.journal.add(sums.flatten().tolist(), (), block, batch)
        self.journal.add(
            losses, removed, None, batch
        )  # last, so a batch with losses has its sums, too

    def loss(self, removed: Sequence[int], texts: Sequence[SourceBatches]) -> float:
        return fmean(
            self.journal.scores(removed, None, [batch for text in texts for batch in text.batches])
        )

    def dense_record(self) -> DenseRecord:
        seen, held_texts = (
            [text for text in self.texts if text.held_out == is_held] for is_held in (False, True)
        )
        loss, held_loss = self.loss((), seen), self.loss((), held_texts) if held_texts else None
        held_out = (
            None
            if held_loss is None
            else HeldOutRecord(loss=held_loss, perplexity=math.exp(held_loss))
        )
        return DenseRecord(loss=loss, perplexity=math.exp(loss), held_out=held_out)

    def use(self, block: int, texts: Iterable[SourceBatches]) -> ExpertUse:
        rows = (self.journal.find((), block, batch) for text in texts for batch in text.batches)
        return ExpertUse(
            *torch.tensor([row for row in rows if row], dtype=torch.float64).sum(0).view(6, -1)
        )

    def rank(self, method: ExpertMethod, block: int) -> ExpertOrder:
        use = self.use(block, (text for text in self.texts if not text.held_out))
        values: list[float] = method.metric.score_experts(use, block).tolist()
        removals = rank_by_group(values, find_experts(self.architecture).groups)[: method.fewer]
        tokens = tuple(use.tokens.long().tolist())
        return ExpertOrder(block=block, removals=removals, scores=tuple(values), tokens=tokens)

    def plan(self, orders: tuple[ExpertOrder, ...], cut: ExpertCut) -> ExpertPlan:
        experts = find_experts(self.architecture)
        return ExpertPlan(
            count=experts.count,
            active=experts.active,
            groups=experts.groups,
            blocks=orders,
            texts=tuple(self.text_record(text, cut) for text in self.texts),
            **_sizes(cut),
        )

    def text_record(self, text: SourceBatches, cut: ExpertCut) -> ExpertsText:
        uses = {block: self.use(block, [text]) for block in find_experts(self.architecture).blocks}
        whole = sum(float(use.squared_products.sum()) for use in uses.values())
        remaining = sum(
            float(use.squared_products[list(cut.kept_experts(block))].sum())
            for block, use in uses.items()
        )
        return ExpertsText(
            text=text.source,
            sequences=text.sequences,
            held_out=text.held_out,
            dense=self.loss((), [text]),
            pruned=self.loss(cut.size_key, [text]),
            kept=remaining / whole if whole else 0.0,
            unreached=sum(int((use.tokens == 0).sum()) for use in uses.values()),
        )


def sum_expert_use(routing: Routing, count: int) -> Sums:
    """Add up how tokens use the experts: the fields of `ExpertUse`, float64 [6, experts]."""
    sums = torch.zeros(6, count, dtype=torch.float64)
    active, width = routing.experts.shape[-1], routing.hidden.shape[-1]
    tokens = max(1, PIECE_BYTES // (active * width * 4))
    given = (routing.hidden, routing.experts, routing.gates)
    pieces = zip(*(torch.split(tensor, tokens) for tensor in given), strict=True)
    for hidden, experts, gates in pieces:
        chosen, gate = experts.reshape(-1), gates.reshape(-1).double().abs()
        norm = (
            routing.run_alone(hidden.repeat_interleave(active, 0), chosen)
            .float()
            .norm(dim=-1)
            .double()
        )
        values = torch.stack(
            [gate.new_ones(len(gate)), gate, norm, gate * norm, norm**2, (gate * norm) ** 2]
        )
        used = (chosen < count) & (
            gate != 0
        )  # beyond the count, nothing is computed; a gate of 0 is masked
        sums.index_add_(1, chosen[used].long().cpu(), values[:, used].cpu())
    return sums


def rank_by_group(scores: Sequence[float], groups: int) -> tuple[int, ...]:
    """Rank the experts, the lowest score first and ties by number, taking one from each group in
    turn.

    So any number of whole turns removes equally many of each group.
    """
    size = len(scores) // groups
    of_groups = [
        sorted(range(first, first + size), key=scores.__getitem__)
        for first in range(0, len(scores), size)
    ]
    return tuple(expert for same_rank in zip(*of_groups, strict=True) for expert in same_rank)


def _sizes(cut: ExpertCut) -> dict[str, tuple[int, int]]:
    architecture, stored = cut.architecture, cut.architecture.source.weights.stored
    parameters = sum(parameter.numel() for parameter in architecture.skeleton.parameters())
    of_expert = expert_parameters(architecture)
    active = parameters - of_expert * (
        cut.count - find_experts(architecture).active
    )  # a token uses as many as before
    remaining = Surgery(architecture, (cut,)).tensors((tensor.name, tensor) for tensor in stored)
    size = sum(
        new_tensor(name, tensor, None, slices, None).size for name, tensor, slices in remaining
    )
    return {
        "parameters": (parameters, parameters - of_expert * cut.fewer),
        "active_parameters": (active, active),
        "weights_bytes": (sum(tensor.size for tensor in stored), size),
    }
