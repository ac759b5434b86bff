"""`sleb search --unit experts`: one walk counts the use of experts, another measures the cut model.

No subsets are searched: a sum over a text finds about the experts that an exact search on this text
finds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from sleb_cli.engine.cut.experts.expert_cut import ExpertCut
from sleb_cli.engine.cut.experts.routing import Routing, watch_routing
from sleb_cli.engine.device import dtype_name, hint_for_nonfinite
from sleb_cli.engine.files.shards import new_tensor
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.experts import Experts, expert_parameters, find_experts
from sleb_cli.engine.search.held_out import hold_out
from sleb_cli.engine.search.inputs import (
    SearchInputs,
    make_plan,
    open_search_journal,
    prepare_search,
    search_record,
    write_sample,
)
from sleb_cli.engine.search.journal import Journal, Name
from sleb_cli.engine.search.losses import MAX_LOSS
from sleb_cli.engine.search.scoring import jobs_of
from sleb_cli.engine.search.settings import Method, Search
from sleb_cli.engine.search.shares import own_shares
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify, task
from sleb_cli.plan import (
    DenseRecord,
    ExpertOrder,
    ExpertPlan,
    ExpertsText,
    HeldOutRecord,
    Plan,
    TargetRecord,
)
from sleb_plugins import ExpertMetric, ExpertUse, ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PIECE_BYTES = 64 << 20
"""About the size of the outputs of single experts that exist at once."""


@dataclass(frozen=True)
class ExpertMethod(Method):
    """How experts are chosen.

    Attributes:
        fewer: how many experts of each block go.
        target: the size to reach, unless a number of experts is given.
    """

    metric: ExpertMetric
    fewer: int
    target: TargetRecord | None


Sums = Tensor
"""The fields of `ExpertUse` of a block, float64 [6, experts]."""


@dataclass(frozen=True)
class SourceBatches:
    """One source's scored or held-out sequences, as batches of the passes."""

    source: str
    held_out: bool
    sequences: int
    batches: range


def search_experts(search: Search, method: ExpertMethod, inputs: SearchInputs) -> Plan:
    """Choose which experts of each block go, and measure the model without them."""
    architecture = search.architecture
    experts = find_experts(architecture)
    model = inputs.model
    unchanged = architecture.source.watch.unchanged
    with unchanged(), model, task(inputs.notify, "Checking the engine"):
        passes, texts, reason = _prepare(search, inputs, method.holdout)
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
        scoring = _ExpertScoring(architecture, experts, passes, texts, journal, inputs.notify)
        scoring.count_uses()
        orders = tuple(scoring.rank(method, block) for block in experts.blocks)
        removed = {order.block: order.removals for order in orders}
        cut = ExpertCut(experts.count, removed, architecture)
        with cut.simulate(model.model):
            scoring.measure(cut.size_key, f"Measuring without {cut.description}")
        sample = write_sample(search, inputs, (), cut.simulate(model.model))
    return make_plan(
        search,
        inputs,
        record,
        dense=scoring.dense_record(),
        removals=(),
        steps=(),
        experts=scoring.plan(orders, cut),
        sample_generation=sample,
    )


def _prepare(
    search: Search, inputs: SearchInputs, holdout: float
) -> tuple[Passes, list[SourceBatches], str | None]:
    """Prepare passes whose batches each belong to one text."""
    whole = inputs.calibration.to(inputs.model.device)
    prepared, reason = prepare_search(search, inputs, whole)
    size = prepared.budget.sequences
    searched, held_out = hold_out(whole, holdout)
    texts: list[SourceBatches] = []
    batches: list[Tensor] = []
    masks: list[Tensor] = []
    for calibration in (searched, held_out):
        if calibration is None:
            continue
        for source in dict.fromkeys(calibration.origins):
            ids, mask = calibration.sequences_of(source)
            first = len(batches)
            batches += torch.split(ids, size)
            if mask is not None:
                masks += torch.split(mask, size)
            numbers = range(first, len(batches))
            texts.append(SourceBatches(source, calibration is held_out, len(ids), numbers))
    budget = replace(prepared.budget, kept_branches=0)
    passes = replace(prepared, batches=batches, loss_mask=masks or None, budget=budget)
    return passes, texts, reason


@dataclass
class _ExpertScoring:
    """Measures losses and the use of experts by batch; processes share work and journal."""

    architecture: Architecture
    experts: Experts
    passes: Passes
    texts: Sequence[SourceBatches]
    journal: Journal
    notify: Notify
    _batch: int = field(default=0, init=False)
    """The batch that runs now."""
    _sums: dict[int, dict[int, Sums]] = field(default_factory=lambda: defaultdict(dict), init=False)
    """The sums of the batches that are not finished, by block."""

    def count_uses(self) -> None:
        self.passes.watch = self._begin
        blocks = list(self.architecture.blocks_of(self.passes.skippable.model))
        with watch_routing(self.experts, blocks, self._add_use):
            self.measure((), "Counting how experts are used")

    def _begin(self, batch: int | None) -> None:
        if batch is None:
            self._sums.clear()
        else:
            self._batch = batch

    def _add_use(self, block: int, routing: Routing) -> None:
        of_batch = self._sums[self._batch]
        sums = sum_expert_use(routing, self.experts.count)
        of_batch[block] = sums + of_batch.get(block, 0)

    def measure(self, removed: tuple[int, ...], title: str) -> None:
        missing: list[Name] = []
        sequences = 0
        for batch in self.passes.numbers:
            if self.journal.find(removed, None, batch) is None:
                missing.append((removed, None, batch))
                sequences += len(self.passes.batches[batch])
        # A single turn reads streamed weights once.
        at_once = not self.passes.skippable.weights.resident
        with task(self.notify, title, sequences, "sequences") as advance:
            for share in own_shares(missing, self.journal.group, at_once=at_once):
                scored = self.passes.score(
                    NegativeLogLikelihood(), (), jobs_of(share), advance=advance
                )
                for batch, _, losses in scored:
                    self._record(batch, losses, removed)
                self.journal.exchange()

    def _record(self, batch: int, losses: list[float], removed: Sequence[int]) -> None:
        if not all(loss < MAX_LOSS for loss in losses):
            dtype = self.passes.skippable.model.dtype
            message = (
                f"{self.architecture.source.id} computes NaN, infinity or a perplexity that is not "
                f"finite in {dtype_name(dtype)}"
            )
            if removed:
                message += " without these experts"
            raise ModelError(f"{message}.", hint=hint_for_nonfinite(dtype))
        for block, sums in self._sums.pop(batch, {}).items():
            self.journal.add(sums.flatten().tolist(), (), block, batch)
        # Last, so that a batch with losses has its sums, too.
        self.journal.add(losses, removed, None, batch)

    def loss(self, removed: Sequence[int], texts: Sequence[SourceBatches]) -> float:
        return fmean(self.journal.scores(removed, None, _batches_of(texts)))

    def dense_record(self) -> DenseRecord:
        held_out = None
        held_out_texts = [text for text in self.texts if text.held_out]
        if held_out_texts:
            loss = self.loss((), held_out_texts)
            held_out = HeldOutRecord(loss=loss, perplexity=math.exp(loss))
        loss = self.loss((), self._searched())
        return DenseRecord(loss=loss, perplexity=math.exp(loss), held_out=held_out)

    def _searched(self) -> list[SourceBatches]:
        return [text for text in self.texts if not text.held_out]

    def use(self, block: int, texts: Sequence[SourceBatches]) -> ExpertUse:
        of_batches = self.journal.scores((), block, _batches_of(texts))
        sums = torch.tensor(of_batches, dtype=torch.float64).view(-1, 6, self.experts.count)
        return ExpertUse(*sums.sum(0))

    def rank(self, method: ExpertMethod, block: int) -> ExpertOrder:
        use = self.use(block, self._searched())
        scores: list[float] = method.metric.score_experts(use, block).tolist()
        ranked = rank_by_group(scores, self.experts.groups)
        return ExpertOrder(
            block=block,
            removals=ranked[: method.fewer],
            scores=tuple(scores),
            tokens=tuple(use.tokens.long().tolist()),
        )

    def plan(self, orders: tuple[ExpertOrder, ...], cut: ExpertCut) -> ExpertPlan:
        skeleton = self.architecture.skeleton
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        of_expert = expert_parameters(self.architecture)
        # A token uses as many as before.
        active = parameters - of_expert * (self.experts.count - self.experts.active)
        return ExpertPlan(
            count=self.experts.count,
            active=self.experts.active,
            groups=self.experts.groups,
            blocks=orders,
            texts=tuple(self._text_record(text, cut) for text in self.texts),
            parameters=(parameters, parameters - of_expert * cut.fewer),
            active_parameters=(active, active),
            weights_bytes=_weights_bytes(cut),
        )

    def _text_record(self, text: SourceBatches, cut: ExpertCut) -> ExpertsText:
        whole = []
        remaining = []
        unreached = 0
        for block in self.experts.blocks:
            use = self.use(block, [text])
            kept_experts = list(cut.kept_experts(block))
            whole.append(float(use.squared_products.sum()))
            remaining.append(float(use.squared_products[kept_experts].sum()))
            unreached += int((use.tokens == 0).sum())
        total = sum(whole)
        return ExpertsText(
            text=text.source,
            sequences=text.sequences,
            held_out=text.held_out,
            dense=self.loss((), [text]),
            pruned=self.loss(cut.size_key, [text]),
            kept=sum(remaining) / total if total else 0.0,
            unreached=unreached,
        )


def _batches_of(texts: Sequence[SourceBatches]) -> list[int]:
    return [batch for text in texts for batch in text.batches]


def sum_expert_use(routing: Routing, count: int) -> Sums:
    """Add up how tokens use the experts: the fields of `ExpertUse`, float64 [6, experts]."""
    sums = torch.zeros(6, count, dtype=torch.float64)
    active = routing.experts.shape[-1]
    width = routing.hidden.shape[-1]
    tokens = max(1, PIECE_BYTES // (active * width * 4))
    pieces = zip(
        torch.split(routing.hidden, tokens),
        torch.split(routing.experts, tokens),
        torch.split(routing.gates, tokens),
        strict=True,
    )
    for hidden, experts, gates in pieces:
        chosen = experts.reshape(-1)
        gate = gates.reshape(-1).double().abs()
        outputs = routing.run_alone(hidden.repeat_interleave(active, 0), chosen)
        norm = outputs.float().norm(dim=-1).double()
        product = gate * norm
        values = torch.stack([torch.ones_like(gate), gate, norm, product, norm**2, product**2])
        # Beyond the count, nothing is computed; a gate of 0 is masked.
        used = (chosen < count) & (gate != 0)
        sums.index_add_(1, chosen[used].long().cpu(), values[:, used].cpu())
    return sums


def rank_by_group(scores: Sequence[float], groups: int) -> tuple[int, ...]:
    """Rank the experts, the lowest score first, taking one from each group in turn.

    Ties go by number.

    So any number of whole turns removes equally many of each group.
    """
    size = len(scores) // groups
    of_groups = []
    for first in range(0, len(scores), size):
        group = range(first, first + size)
        of_groups.append(sorted(group, key=lambda expert: scores[expert]))
    return tuple(ranked[turn] for turn in range(size) for ranked in of_groups)


def _weights_bytes(cut: ExpertCut) -> tuple[int, int]:
    """Return the size of the stored weights before and after the cut."""
    stored = cut.architecture.source.weights.stored
    surgery = Surgery(cut.architecture, (cut,))
    after = 0
    for name, tensor, slices in surgery.tensors((tensor.name, tensor) for tensor in stored):
        after += new_tensor(name, tensor, None, slices, None).size
    return sum(tensor.size for tensor in stored), after
