"""Find where two models differ: each stage of both gets the dense model's hidden states."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.vocabularies import SharedTokens
from sleb_cli.events import Notice, Notify, task
from sleb_cli.order import OTHER
from sleb_cli.results import StageRecord
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError

MAX_TOKENS = 2_048
"""How many tokens of the first text are read."""
HEAD_POSITIONS = 64
"""At how many positions of each sequence the heads are compared."""
STANDS_OUT = 3.0
"""A stage stands out that differs so many times as much as the median one..."""
ROW_STANDS_OUT = 8.0
"""A row of the head stands out that differs so many times as much as the median row: rounding gives
rows up to 6 times."""
MIN_DIFFERENCE = 0.05
"""...and both at least by this share of what is computed."""


def have_same_stages(dense: Architecture, other: Architecture, notify: Notify) -> bool:
    """Whether two models have as many blocks, for hidden states of one width; if not, say so."""
    stages = []
    for model in (other, dense):
        width = model.text_config.hidden_size
        stages.append(f"{plural(model.block_count, 'block')} of width {width:,}")
    if stages[0] == stages[1]:
        return True
    names = [other.source.name, dense.source.name]
    notify(
        Notice(f"The blocks are not compared: {names[0]} has {stages[0]}, {names[1]} {stages[1]}.")
    )
    return False


def compare_stages(models: Models, ids: Tensor, batch_size: int | None) -> tuple[StageRecord, ...]:
    """Compare the stages of both models of a comparison on some windows, [windows, positions].

    An error does not grow from stage to stage: every one is given what the dense model computes. If
    blocks of a model do not run on their own, the listener is told, and nothing is returned.
    """
    assert models.shared
    windows = max(1, MAX_TOKENS // ids.shape[1])
    with models.without(()) as dense, models.without(OTHER) as other, torch.inference_mode():
        try:
            ids = ids[: min(windows, batch_size or windows)]
            differences, rows = _compare(dense, other, ids.to(dense.device), models)
        except UnsupportedModelError as error:
            models.notify(Notice(f"The blocks are not compared: {error.message}"))
            return ()
    *stages, head = judge(differences)
    if rows:
        head = head.model_copy(update={"stands_out": True, "rows": rows})
    return (*stages, head)


def judge(differences: dict[str, float]) -> tuple[StageRecord, ...]:
    """Mark the stages that stand out."""
    usual = median(differences.values())
    records = []
    for stage, difference in differences.items():
        stands_out = difference > max(MIN_DIFFERENCE, STANDS_OUT * usual)
        records.append(StageRecord(stage=stage, difference=difference, stands_out=stands_out))
    return tuple(records)


def judge_rows(differences: Tensor) -> Tensor:
    """Return the rows of the head that stand out, the most different first."""
    least = max(MIN_DIFFERENCE, ROW_STANDS_OUT * float(differences.median()))
    order = differences.argsort(descending=True)
    return order[differences[order] > least]


def _compare(
    dense: SkippableModel, other: SkippableModel, ids: Tensor, models: Models
) -> tuple[dict[str, float], tuple[int, ...]]:
    """Return how far each stage differs, and the tokens whose rows of the head stand out."""
    shared = models.shared
    assert shared
    own_ids = shared.of_other(ids)
    calls = list(zip(dense.calls(ids), other.calls(own_ids), strict=True))
    hidden = calls[0][0].entering
    differences = {"embeddings": _relative(calls[0][1].entering, hidden, hidden)}
    blocks = range(len(calls))
    count = len(calls) + 2
    with (
        task(models.notify, "Comparing blocks", count, "stages") as advance,
        dense.weights.visit(blocks) as visit,
        other.weights.visit(blocks) as other_visit,
    ):
        advance(1)
        for block, (call, other_call) in enumerate(calls):
            visit.load(block)
            other_visit.load(block)
            leaving = dense.run_block(call, hidden)
            theirs = other.run_block(other_call, hidden)
            differences[f"block {block}"] = _relative(theirs, leaving, leaving - hidden)
            hidden = leaving
            advance(1)
    differences["head"], rows = _compare_heads(dense, other, hidden, ids, own_ids, shared)
    return differences, rows


def _relative(theirs: Tensor, ours: Tensor, added: Tensor) -> float:
    """Return the mean over tokens of the difference's norm, by the norm of what is added."""
    difference = (theirs.to(ours.device).float() - ours.float()).norm(dim=-1)
    norm = added.float().norm(dim=-1).clamp(min=1e-12)
    return float((difference / norm).mean())


def _compare_heads(
    dense: SkippableModel,
    other: SkippableModel,
    hidden: Tensor,
    ids: Tensor,
    own_ids: Tensor,
    shared: SharedTokens,
) -> tuple[float, tuple[int, ...]]:
    """Compare the logits that the heads give for the same states: all, and token by token.

    A fault may be in a single row of the head, which does not show in the mean.
    """
    everything = (slice(None), slice(None))
    rows = (slice(None), slice(-HEAD_POSITIONS, None))
    head = shared.narrow(dense.head(hidden[rows], ids[rows]), dense=True)
    other_head = shared.narrow(other.head(hidden[rows], own_ids[rows]), dense=False)
    ours = head[everything].float().flatten(0, 1)
    theirs = other_head[everything].float().flatten(0, 1)
    # The model's choice does not depend on what is added to all logits of a position.
    centered = ours - ours.mean(1, keepdim=True)
    usual = centered.norm(dim=0).median().clamp(min=1e-6)
    by_row = (theirs.to(ours.device) - ours).norm(dim=0) / usual
    places = judge_rows(by_row.cpu())
    if not shared.is_whole:
        places = shared.dense[places]
    return _relative(theirs, ours, centered), tuple(places.tolist())
