"""Perplexity of a text and divergence from the dense model, token by token, for any number of
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.memory_needs import states_bytes
from sleb_cli.engine.forward.predictions import Logits, predict_together
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.process_group import deal
from sleb_cli.engine.quality.models import CHECKED_TOKENS, Models
from sleb_cli.engine.quality.token_scores import (
    Scores,
    divergence_record,
    join_scores,
    score_tokens,
    window_losses,
)
from sleb_cli.engine.statistics import clustered_mean
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.windows import EvaluationWindows, tokens_sha256
from sleb_cli.events import task
from sleb_cli.order import SizeKey
from sleb_cli.results import PrunedTextScores, TextResult, TextScores
from sleb_plugins import ModelError

# About how many tokens a process scores before the processes exchange their scores.
TOKENS_PER_PART = 16_384


def measure_text(
    windows: EvaluationWindows, models: Models, sizes: Sequence[SizeKey], batch_size: int | None
) -> TextResult:
    """Measure the dense model and some sizes on a text, whose windows processes share out.

    If `batch_size` is None, a batch has as many windows as suit the device.
    """
    with ExitStack() as opened:
        dense, *pruned = _Scorer(models, [(), *sizes], windows.ids, batch_size, opened).scores(
            windows.text.source
        )
    counted, clusters = windows.counted, windows.clusters

    def compare(removals: SizeKey, scores: Scores) -> PrunedTextScores:
        # The tokens of a cluster are one observation.
        change = clustered_mean(
            (scores["nll"].double() - dense["nll"].double())[counted], clusters[counted]
        )
        return PrunedTextScores(
            **_summary(scores, windows, models.name(removals)),
            removals=removals,
            log_ratio=change.mean,
            standard_error=change.standard_error,
            interval=change.interval,
            divergence=divergence_record(scores, dense, counted, clusters),
        )

    return TextResult(
        **description(windows),
        dense=TextScores(**_summary(dense, windows, models.name(()))),
        pruned=tuple(map(compare, sizes, pruned)),
    )


def description(windows: EvaluationWindows) -> dict[str, Any]:
    """Return the fields of a `TextResult` that identify the predicted tokens."""
    return {
        "text": windows.text.source,
        "windows": len(windows.ids),
        "sequence_length": windows.ids.shape[1],
        "bos": windows.bos,
        "tokens": int(windows.counted.sum()),
        "clusters": len(set(windows.clusters[windows.counted].tolist())),
        "clustered_by": windows.clustered_by,
        "tokens_sha256": tokens_sha256(windows.ids),
        "clusters_sha256": tokens_sha256(windows.clusters.where(windows.counted, -1)),
    }


def _summary(scores: Scores, windows: EvaluationWindows, model: str) -> dict[str, Any]:
    counted = windows.counted
    loss = float(scores["nll"][counted].double().mean())
    if not math.isfinite(loss) or loss > math.log(1e300):
        raise ModelError(
            f"The loss of the {model} on {windows.text.source} is {loss}.",
            hint="Try --dtype float32.",
        )
    return {"perplexity": math.exp(loss), "losses": window_losses(scores, counted)}


class _Scorer:
    """Runs models on the same windows, the dense one first."""

    def __init__(
        self,
        models: Models,
        sizes: Sequence[SizeKey],
        ids: Tensor,
        batch_size: int | None,
        opened: ExitStack,
    ) -> None:
        self.models, self.sizes, self.opened = models, sizes, opened
        self.skippable: dict[SizeKey, SkippableModel] = {}
        batch, per_part = batch_size or 1, max(1, TOKENS_PER_PART // ids.shape[1])
        self.parts = torch.split(ids, max(1, per_part // batch) * batch)
        self.dense = self._model(())[0]
        for removals in () if models.differ_in_blocks_alone else sizes:
            self._model(removals)
        passes, _ = prepare_passes(
            self.dense,
            self.parts[0].to(self.dense.device),
            models.notify,
            memory=partial(available_memory, group=models.group),
            batch_size=batch_size,
            checked=CHECKED_TOKENS,
        )
        self.forks, self.size, self.positions = (
            passes.forks,
            passes.budget.sequences,
            passes.budget.positions,
        )
        if not self.forks:
            for removals in sizes:  # here, since models are not loaded in inference mode
                self._model(removals)

    def scores(self, source: str) -> list[Scores]:
        group, together = self.models.group, self._parts_together()
        runs = [
            range(first, len(self.parts))[:together]
            for first in range(0, len(self.parts), together)
        ]
        by_part: dict[int, list[Scores]] = {}
        with task(
            self.models.notify, f"Perplexity on {source}", sum(map(len, self.parts)), "windows"
        ) as advance:
            for turn in deal(runs, group.size):
                mine = (scored for run in turn[group.rank] for scored in self._score_parts(run))
                for number, scores in group.gather_in_order(mine):
                    by_part[number] = scores
                    loss = min(float(scores[0]["nll"].double().mean()), 700)
                    advance(
                        len(self.parts[number]), f"dense: {math.exp(loss):.2f} in the last windows"
                    )
        return [
            join_scores(of_size)
            for of_size in zip(*(by_part[number] for number in sorted(by_part)), strict=True)
        ]

    def _parts_together(self) -> int:
        # If blocks are streamed, as many as there is memory for share a read of the weights.
        if self.dense.weights.resident:
            return 1
        needed = states_bytes(
            self.models.architecture, self.models.placement.dtype, self.parts[0].numel()
        )
        return max(1, available_memory(CPU, self.models.group) // (needed * (len(self.sizes) + 1)))

    @torch.inference_mode()
    def _score_parts(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Scores]]]:
        windows = [self.parts[number].to(self.dense.device) for number in numbers]

        def score(size: int) -> list[list[list[Scores]]]:
            self.size = size  # later parts begin with the size that fitted
            split = [torch.split(ids, size) for ids in windows]
            batches = [batch for of_part in split for batch in of_part]
            groups = [[batch] for batch in batches] if self.dense.weights.resident else [batches]
            predicted = (of_batch for group in groups for of_batch in self._predict(group))
            return [
                [score_tokens(batch, next(predicted), self.positions) for batch in of_part]
                for of_part in split
            ]

        device = self.models.placement.device
        scored = in_smaller_pieces(
            score, self.size, device, self.models.notify, "continuing with {} windows"
        )
        for number, batches in zip(numbers, scored, strict=True):
            yield number, [join_scores(of_size) for of_size in zip(*batches, strict=True)]

    def _predict(self, batches: Sequence[Tensor]) -> Iterator[list[Logits]]:
        # Models that differ from the dense one in blocks alone walk with it.
        together = (
            (len(self.sizes) if self.models.differ_in_blocks_alone else 1) if self.forks else 0
        )
        walks: list[Any] = (
            [predict_together(self.dense, batches, self.sizes[:together])] if together else []
        )
        for size in self.sizes[together:]:
            skippable, gone = self._model(size)
            # All batches are predicted in here, since the model is whole again behind it.
            with gone.simulate(skippable.model):
                if self.forks:
                    walks.append(iter(list(predict_together(skippable, batches, [gone.removals]))))
                else:
                    walks.append(iter([[skippable.logits(ids, gone.removals)] for ids in batches]))
        return (
            [logits for walk in of_batch for logits in walk]
            for of_batch in zip(*walks, strict=True)
        )

    def _model(self, removals: SizeKey) -> tuple[SkippableModel, Surgery]:
        # If two models may not fit into memory, the dense one stands in, with the surgery to make
        # on it.
        gone = self.models.surgeries.get(removals) if self.models.one_at_a_time else None
        if (loaded := () if gone else removals) not in self.skippable:
            self.skippable[loaded] = self.opened.enter_context(self.models.without(loaded))
        return self.skippable[loaded], gone or Surgery(self.models.architecture)
