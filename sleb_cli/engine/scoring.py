"""Score the removal of each candidate block, for each of the four kinds of metric.

A scorer takes the blocks removed so far and the candidates of this step, and gives a score for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.gates import GatedModel
from sleb_cli.events import CandidateScored, Notify
from sleb_cli.plan import Engine
from sleb_plugins import (
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelMetric,
    PluginError,
    WeightMetric,
)
from sleb_plugins.metrics.nll import NegativeLogLikelihood

Scorer = Callable[[Collection[int], Sequence[int]], dict[int, float]]

# Positions that are scored at once, so that the float32 copy of the logits stays small.
CHUNK_POSITIONS = 512


@dataclass(frozen=True)
class Scoring:
    """What every scorer works on: a gated model, and the calibration sequences in batches on its device."""

    gated: GatedModel
    batches: tuple[Tensor, ...]
    tokenizer: Any
    notify: Notify

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are."""
        return sum(len(batch) for batch in self.batches)

    @torch.inference_mode()
    def loss(self, removed: Collection[int]) -> float:
        """Give the mean negative log-likelihood, in nats per token, of the model without the removed blocks."""
        metric = NegativeLogLikelihood()
        losses = [score_sequences(metric, self.gated.logits(ids, removed), ids) for ids in self.batches]
        return float(torch.cat(losses).mean())

    def scorer(self, metric: Metric) -> tuple[Scorer, Engine, str | None]:
        """Choose how `metric` is computed; the reason is given where it is not the usual way."""
        if isinstance(metric, LogitMetric):
            reason = self._why_not_prefix()
            engine: Engine = "plain" if reason else "prefix"
            return (
                lambda removed, candidates: self._score_logits(metric, removed, candidates, engine),
                engine,
                reason,
            )
        if isinstance(metric, HiddenStateMetric):
            return (
                lambda removed, candidates: self._score_states(metric, removed, candidates),
                "hidden-states",
                None,
            )
        if isinstance(metric, WeightMetric):
            return (
                lambda removed, candidates: self._score_weights(metric, removed, candidates),
                "weights",
                None,
            )
        assert isinstance(metric, ModelMetric)
        return lambda removed, candidates: self._score_models(metric, removed, candidates), "model", None

    @torch.inference_mode()
    def _score_logits(
        self, metric: LogitMetric, removed: Collection[int], candidates: Sequence[int], engine: Engine
    ) -> dict[int, float]:
        """Run the model once without each candidate; with `prefix`, only from the candidate on."""
        scores: dict[int, list[Tensor]] = {block: [] for block in candidates}
        for ids in self.batches:
            dense = self.gated.logits(ids, ()) if metric.needs_dense_logits else None
            states = self.gated.entering_states(ids, removed) if engine == "prefix" else {}
            for block in candidates:
                if engine == "prefix":
                    logits = self.gated.logits_from(block, states[block], ids, removed)
                else:
                    logits = self.gated.logits(ids, {*removed, block})
                scores[block].append(score_sequences(metric, logits, ids, dense))
                self._tell(removed, block, float(torch.cat(scores[block]).mean()), len(ids))
        return {block: float(torch.cat(parts).mean()) for block, parts in scores.items()}

    @torch.inference_mode()
    def _score_states(
        self, metric: HiddenStateMetric, removed: Collection[int], candidates: Sequence[int]
    ) -> dict[int, float]:
        """Run the model once, and score every block on the way."""
        totals = dict.fromkeys(candidates, 0.0)
        for done, ids in enumerate(self.batches, start=1):

            def listen(block: int, entering: Tensor, leaving: Tensor) -> None:
                if block in totals:
                    scores = metric.score_tokens(entering.float(), leaving.float())
                    _require_shape(metric, scores, entering.shape[:-1])
                    totals[block] += float(scores.double().mean(-1).sum())

            self.gated.watch(ids, removed, listen)
            seen = sum(len(batch) for batch in self.batches[:done])
            for block in candidates:
                self._tell(removed, block, totals[block] / seen, len(ids))
        return {block: total / self.sequences for block, total in totals.items()}

    def _score_weights(
        self, metric: WeightMetric, removed: Collection[int], candidates: Sequence[int]
    ) -> dict[int, float]:
        """Look at each block's parameters, after one backward pass where the metric asks for gradients."""
        model = self.gated.model
        try:
            if metric.needs_gradients:
                self._accumulate_gradients(removed)
            scores = {}
            for block in candidates:
                scores[block] = _number(metric, metric.score_block(self.gated.gates[block].block))
                self._tell(removed, block, scores[block], self.sequences)
            return scores
        finally:
            model.zero_grad(set_to_none=True)
            model.requires_grad_(False)

    def _accumulate_gradients(self, removed: Collection[int]) -> None:
        self.gated.model.requires_grad_(True)
        metric = NegativeLogLikelihood()
        for ids in self.batches:
            losses = score_sequences(metric, self.gated.logits(ids, removed), ids)
            (losses.sum() / self.sequences).backward()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def _score_models(
        self, metric: ModelMetric, removed: Collection[int], candidates: Sequence[int]
    ) -> dict[int, float]:
        """Hand the gated model over, once for each candidate."""
        sequences = torch.cat(self.batches)
        scores = {}
        for block in candidates:
            self.gated.switch_off({*removed, block})
            scores[block] = _number(metric, metric.score_model(self.gated.model, self.tokenizer, sequences))
            self._tell(removed, block, scores[block], self.sequences)
        return scores

    @torch.inference_mode()
    def _why_not_prefix(self) -> str | None:
        """Compare prefix reuse with one-at-a-time skipping on the first sequence; say what differs, if anything.

        The last block puts the most of the model out of play, the middle one about half.
        """
        ids, count = self.batches[0][:1], len(self.gated.gates)
        states = self.gated.entering_states(ids, ())
        for block in {count - 1, count // 2}:
            if block not in states:
                return f"block {block} is not called on every pass"
            plain = self.gated.logits(ids, {block})
            prefix = self.gated.logits_from(block, states[block], ids, ())
            if not same_numbers(plain, prefix):
                return f"without block {block}, resuming there gives other logits than running the whole model"
        return None

    def _tell(self, removed: Collection[int], block: int, score: float, sequences: int) -> None:
        self.notify(CandidateScored(len(removed) + 1, block, score, sequences))


def score_sequences(metric: LogitMetric, logits: Tensor, ids: Tensor, dense_logits: Tensor | None = None) -> Tensor:
    """Give each sequence's mean score over its predicted tokens, float64 [batch]; logits are widened in chunks."""
    means = []
    for row in range(len(ids)):
        scores = []
        for start in range(0, ids.shape[1] - 1, CHUNK_POSITIONS):
            stop = min(start + CHUNK_POSITIONS, ids.shape[1] - 1)
            dense = None if dense_logits is None else dense_logits[row, start:stop].float()
            targets = ids[row, start + 1 : stop + 1]
            scores.append(metric.score_tokens(logits[row, start:stop].float(), targets, dense))
            _require_shape(metric, scores[-1], targets.shape)
        means.append(torch.cat(scores).double().mean())
    return torch.stack(means)


def same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whether two logits of the same dtype differ by no more than its rounding, relative to their size."""
    if torch.equal(left, right):
        return True
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(left.dtype, 3e-2)
    scale = float(left.abs().max().float())
    return bool((left.float() - right.float()).abs().max() <= tolerance * scale)


def _require_shape(metric: Metric, scores: Tensor, shape: torch.Size) -> None:
    found = getattr(scores, "shape", None)
    if found != shape:
        raise PluginError(
            f"The metric {metric.name!r} gave scores of shape {found}, where one for each of {list(shape)} belongs.",
            hint="Tell its author.",
        )


def _number(metric: Metric, score: Any) -> float:
    if not isinstance(score, int | float):
        raise PluginError(f"The metric {metric.name!r} gave {score!r}, which is not a number.", hint="Tell its author.")
    return float(score)
