"""`sleb search --unit experts`: one walk counts how texts use the experts, another measures the model without some.

No subsets are searched: on the text that it is summed on, a sum finds about what an exact search finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.cut.experts.expert_cut import ExpertCut
from sleb_cli.engine.cut.experts.routing import Choice, watched
from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.files.shards import new_tensor
from sleb_cli.engine.forward.forecast import announce
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import Job, Passes
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.model.experts import Experts
from sleb_cli.engine.process_group import deal
from sleb_cli.engine.search.held_out import hold_out
from sleb_cli.engine.search.inputs import SearchInputs, found_plan, open_search_journal, search_record, write_sample
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.losses import LARGEST_LOSS
from sleb_cli.engine.search.settings import ExpertMethod, Search
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify, task
from sleb_cli.plan import DenseRecord, ExpertOrder, ExpertPlan, ExpertsText, HeldOutRecord, Plan
from sleb_plugins import ExpertMetric, ExpertUse, ModelError, PluginError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PIECE_BYTES = 64 << 20
"""About how much the outputs of single experts take at once."""

SCORED_WALK = 1.5
"""What a walk that counts costs, in walks that do not: the experts run twice."""

Sums = Tensor
"""The fields of `ExpertUse` of a block, float64 [6, experts]."""


@dataclass(frozen=True)
class Text:
    """The sequences of one source that scores see, or that are held out: some batches of the passes."""

    source: str
    held_out: bool
    batches: range


def search_experts(search: Search, method: ExpertMethod, inputs: SearchInputs, started: float) -> Plan:
    """Choose which experts of each block go, and measure the model without them.

    Raises:
        SlebError: a subclass that fits, for problems that only show once the model runs.
    """
    architecture, model = search.model.architecture, inputs.model
    experts = architecture.experts
    unchanged = architecture.source.watch.unchanged
    with unchanged(), model, task(inputs.notify, "Checking the engine"):
        passes, texts, reason = _passes(search, inputs, method.holdout)
    held_out = sum(len(passes.batches[batch]) for text in texts if text.held_out for batch in text.batches)
    record = search_record(
        search,
        passes,
        held_out,
        remove=method.fewer,
        target=method.target,
        protect_first=0,
        protect_last=0,
        engine="fork" if passes.forks else "plain",
        engine_reason=reason,
    )
    with open_search_journal(search, inputs, record) as journal, unchanged(), model, torch.inference_mode():
        measuring = _Measuring(passes, texts, experts, architecture.source.id, journal, inputs.notify)
        _announce(measuring)
        blocks = [*architecture.blocks_of(model.model)]
        uses = measuring.count_uses(blocks)
        orders = _orders(method, experts, uses, [text for text in texts if not text.held_out])
        removed = {order.block: order.removals for order in orders}
        cut = ExpertCut(experts.count, removed, architecture)
        with cut.absent(model.model):
            measuring.measure(cut.steps, f"Measuring without {cut.what}")
        sample = write_sample(search, inputs, (), cut.absent(model.model))
    found = ExpertPlan(
        count=experts.count,
        active=experts.active,
        groups=experts.groups,
        blocks=orders,
        texts=tuple(measuring.text_record(text, cut, uses) for text in texts),
        **_sizes(cut),
    )
    return found_plan(
        search,
        inputs,
        record,
        started,
        search=record,
        dense=measuring.dense_record(),
        removals=(),
        steps=(),
        experts=found,
        sample_generation=sample,
    )


def _passes(search: Search, inputs: SearchInputs, holdout: float) -> tuple[Passes, list[Text], str | None]:
    """Fit the passes into memory, with batches that each belong to one text."""
    whole = inputs.calibration.to(inputs.model.device)
    prepared, reason = prepare_passes(
        inputs.model,
        whole.sequences,
        inputs.notify,
        loss_mask=whole.loss_mask,
        memory=partial(available_memory, group=inputs.group, asked=search.model.memory),
        batch_size=search.model.batch_size,
        walks_together=True,
    )
    texts, batches, masks = list[Text](), list[Tensor](), list[Tensor]()
    for held, part in enumerate(filter(None, hold_out(whole, holdout))):
        for source in dict.fromkeys(part.origins):
            ids, mask = part.sequences_of(source)
            first, size = len(batches), prepared.budget.sequences
            batches += torch.split(ids, size)
            masks += [] if mask is None else torch.split(mask, size)
            texts.append(Text(source, bool(held), range(first, len(batches))))
    budget = replace(prepared.budget, kept=0)
    return replace(prepared, batches=batches, loss_mask=masks or None, budget=budget), texts, reason


@dataclass
class _Measuring:
    """Measures losses and the use of experts, batch by batch; processes share them, and the journal keeps them."""

    passes: Passes
    texts: Sequence[Text]
    experts: Experts
    model: str
    journal: Journal
    notify: Notify
    sums: dict[int, dict[int, Sums]] = field(default_factory=dict, init=False)
    """Of batches that run now, by block."""

    def count_uses(self, blocks: Sequence[torch.nn.Module]) -> dict[int, dict[int, Sums]]:
        """Return how each batch uses the experts of each block, and measure the dense model on it."""
        current = 0

        def watch(batch: int | None) -> None:
            nonlocal current
            if batch is None:
                self.sums.clear()
            else:
                current = batch

        def add(block: int, choice: Choice) -> None:
            of_batch = self.sums.setdefault(current, {})
            found = sums_of(choice, self.experts.count)
            of_batch[block] = found + of_batch[block] if block in of_batch else found

        self.passes.watch = watch
        with watched(self.experts, blocks, add):
            self.measure((), "Counting how experts are used")
        self.passes.watch = lambda batch: None
        found = {}
        for batch in self.passes.numbers:
            rows = {block: self.journal.find((), block, batch) for block in self.experts.blocks}
            found[batch] = {
                block: torch.tensor(row, dtype=torch.float64).view(6, -1) for block, row in rows.items() if row
            }
        return found

    def measure(self, removed: Sequence[int], what: str) -> None:
        """Measure the losses of the batches without what goes, and record what was counted meanwhile."""
        missing = [batch for batch in self.passes.numbers if self.journal.find(removed, None, batch) is None]
        group = self.journal.group
        if self.passes.skippable.weights.resident:
            turns = [*deal(missing, group.size)]
        else:  # one turn, which reads the weights once
            turns = [[missing[rank :: group.size] for rank in range(group.size)]]
        with task(self.notify, what, sum(len(self.passes.batches[batch]) for batch in missing), "sequences") as advance:
            for turn in turns if missing else ():
                jobs: list[Job] = [(batch, ()) for batch in turn[group.rank]]
                for batch, _, losses in self.passes.score(NegativeLogLikelihood(), (), jobs, advance=advance):
                    self._record(batch, losses, removed)
                self.journal.exchange()

    def _record(self, batch: int, losses: list[float], removed: Sequence[int]) -> None:
        if not all(loss < LARGEST_LOSS for loss in losses):
            dtype = self.passes.skippable.model.dtype
            raise ModelError(
                f"{self.model} computes NaN, infinity or a perplexity that is not finite in {dtype_name(dtype)}"
                f"{' without these experts' if removed else ''}.",
                hint=wider_range(dtype),
            )
        for block, sums in self.sums.pop(batch, {}).items():
            self.journal.add(sums.flatten().tolist(), (), block, batch)
        self.journal.add(losses, removed, None, batch)  # the last of a batch, so the others are there

    def loss(self, removed: Sequence[int], texts: Sequence[Text]) -> float:
        """Return the mean loss of the sequences of some texts, in nats per token."""
        return fmean(self.journal.scores(removed, None, [batch for text in texts for batch in text.batches]))

    def dense_record(self) -> DenseRecord:
        """Return the losses of the dense model."""
        seen, held = ([text for text in self.texts if text.held_out == is_held] for is_held in (False, True))
        loss = self.loss((), seen)
        of_held = self.loss((), held) if held else None
        held_out = None if of_held is None else HeldOutRecord(loss=of_held, perplexity=math.exp(of_held))
        return DenseRecord(loss=loss, perplexity=math.exp(loss), held_out=held_out)

    def text_record(self, text: Text, cut: ExpertCut, uses: Mapping[int, Mapping[int, Sums]]) -> ExpertsText:
        """Return the losses on a text, and how it uses the experts."""
        whole, kept, unreached = 0.0, 0.0, 0
        for block in self.experts.blocks:
            use = _use_of(uses, [text], block)
            unreached += int((use.tokens == 0).sum())
            whole += float(use.squared_products.sum())
            kept += float(use.squared_products[list(cut.kept(block))].sum())
        return ExpertsText(
            text=text.source,
            sequences=sum(len(self.passes.batches[batch]) for batch in text.batches),
            held_out=text.held_out,
            dense=self.loss((), [text]),
            pruned=self.loss(cut.steps, [text]),
            kept=kept / whole if whole else 0.0,
            unreached=unreached,
        )


def sums_of(choice: Choice, count: int) -> Sums:
    """Add up how tokens use the experts: the fields of `ExpertUse`, float64 [6, experts]."""
    found = torch.zeros(6, count, dtype=torch.float64)
    active, width = choice.experts.shape[-1], choice.hidden.shape[-1]
    tokens = max(1, PIECE_BYTES // (active * width * 4))
    given = (choice.hidden, choice.experts, choice.gates)
    pieces = zip(*(torch.split(each, tokens) for each in given), strict=True)
    for hidden, experts, gates in pieces:
        chosen, gate = experts.reshape(-1), gates.reshape(-1).double().abs()
        norm = choice.alone(hidden.repeat_interleave(active, 0), chosen).float().norm(dim=-1).double()
        values = torch.stack([gate.new_ones(len(gate)), gate, norm, gate * norm, norm**2, (gate * norm) ** 2])
        used = (chosen < count) & (gate != 0)  # neither one that computes nothing, nor one that is masked
        found.index_add_(1, chosen[used].long().cpu(), values[:, used].cpu())
    return found


def _use_of(uses: Mapping[int, Mapping[int, Sums]], texts: Sequence[Text], block: int) -> ExpertUse:
    """Add up the use of a block's experts over some texts, in the order of their batches."""
    rows = [uses[batch][block] for text in texts for batch in text.batches if block in uses[batch]]
    return ExpertUse(*torch.stack(rows).sum(0))


def _orders(
    method: ExpertMethod, experts: Experts, uses: Mapping[int, Mapping[int, Sums]], texts: Sequence[Text]
) -> tuple[ExpertOrder, ...]:
    """Rank the experts of each block, and say which go."""
    orders = []
    for block in experts.blocks:
        use = _use_of(uses, texts, block)
        scores = _scores(method.metric, use, block)
        orders.append(
            ExpertOrder(
                block=block,
                removals=lowest(scores, experts.groups)[: method.fewer],
                scores=tuple(scores),
                tokens=tuple(map(int, use.tokens.tolist())),
            )
        )
    return tuple(orders)


def _scores(metric: ExpertMetric, use: ExpertUse, block: int) -> list[float]:
    scores: Any = metric.score_experts(use, block)
    values = scores.tolist() if isinstance(scores, Tensor) else None
    if not isinstance(values, list) or len(values) != len(use.tokens) or not all(map(math.isfinite, values)):
        raise PluginError(
            f"The metric {metric.name!r} did not score each of the {len(use.tokens)} experts of block {block} by a "
            "finite number.",
            hint="Report it to the author of the plugin, which `sleb plugins` names.",
        )
    return values


def lowest(scores: Sequence[float], groups: int) -> tuple[int, ...]:
    """Return the experts, the lowest score first, ties by number; one of each group after the other."""
    size = len(scores) // groups
    of_groups = [sorted(range(first, first + size), key=scores.__getitem__) for first in range(0, len(scores), size)]
    return tuple(expert for of_place in zip(*of_groups, strict=True) for expert in of_place)


def _sizes(cut: ExpertCut) -> dict[str, tuple[int, int]]:
    """Return parameters, those that a token uses, and bytes of the weights, before and after."""
    architecture, stored = cut.architecture, cut.architecture.source.weights.stored
    surgery = Surgery(architecture, (cut,))
    pruned = architecture.build(architecture.read_config(surgery.prune_config()))
    dense, left = (sum(each.numel() for each in model.parameters()) for model in (architecture.skeleton, pruned))
    kept = surgery.tensors((tensor.name, tensor) for tensor in stored)
    size = sum(new_tensor(name, tensor, None, slices, None).size for name, tensor, slices in kept)
    each = (dense - left) // cut.fewer  # one expert of each block
    active = [
        total - each * (count - architecture.experts.active)
        for total, count in ((dense, cut.count), (left, cut.count - cut.fewer))
    ]
    return {
        "parameters": (dense, left),
        "active_parameters": (active[0], active[1]),
        "weights_bytes": (sum(tensor.size for tensor in stored), size),
    }


def _announce(measuring: _Measuring) -> None:
    passes = measuring.passes
    tokens = sum(batch.numel() for batch in passes.batches) / measuring.journal.group.size
    walks = (1 + SCORED_WALK) * len(passes.skippable.switches) + 2 * passes.skippable.head_blocks
    what = f"Search: two walks of {tokens:,.0f} tokens"
    announce(measuring.notify, what, tokens * walks, passes.skippable, passes.batches[0])
