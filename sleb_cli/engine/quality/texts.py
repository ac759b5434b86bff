"""Perplexity of a text and divergence from the dense model, token by token, at several sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.fork_check import why_not_fork
from sleb_cli.engine.forward.logits import Logits
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.memory_needs import states_bytes
from sleb_cli.engine.forward.predictions import predict_together
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.model.padded import Tokens, split, usual_length
from sleb_cli.engine.process_group import deal
from sleb_cli.engine.quality.models import CHECKED_TOKENS, Models
from sleb_cli.engine.quality.token_scores import (
    Scores,
    divergence_record,
    join_models,
    score_tokens,
    window_losses,
)
from sleb_cli.engine.quality.vocabularies import SharedTokens
from sleb_cli.engine.statistics import clustered_mean
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.windows import EvaluationWindows, tokens_sha256
from sleb_cli.events import Advance, Notice, Notify, ignore, task
from sleb_cli.order import OTHER, SizeKey
from sleb_cli.results import PrunedTextScores, TextResult, TextScores
from sleb_cli.units import format_seconds
from sleb_plugins import ModelError

# About how many tokens a process scores before the processes exchange their scores.
TOKENS_PER_PART = 16_384

WINDOWS = "windows"
"""The unit of a text whose perplexity is measured."""
PACE_SECONDS = 20
"""When it is known how long all windows take."""
LONG_SECONDS = 300
"""If they take longer, fewer are offered."""
FEW_WINDOWS = 32


def measure_text(
    windows: EvaluationWindows, models: Models, sizes: Sequence[SizeKey], batch_size: int | None
) -> TextResult:
    """Measure the dense model and some sizes on a text, whose windows processes share out.

    If `batch_size` is None, a batch has as many windows as suit the device.
    """
    score = score_tokens
    if models.shared:
        score = partial(_score_shared, models.shared)
    with ExitStack() as opened:
        scorer = Scorer(models, [(), *sizes], windows.ids, batch_size, opened, score)
        dense, *scored = scorer.score_all(f"Perplexity on {windows.text.source}", WINDOWS)
    counted = windows.counted
    clusters = windows.clusters[counted]
    pruned = []
    for size, scores in zip(sizes, scored, strict=True):
        # The tokens of a cluster are one observation.
        losses = (scores["nll"].double() - dense["nll"].double())[counted]
        change = clustered_mean(losses, clusters)
        pruned.append(
            PrunedTextScores(
                **_summary(scores, windows, models.name(size)),
                removals=size,
                log_ratio=change.mean,
                standard_error=change.standard_error,
                interval=change.interval,
                divergence=divergence_record(scores, dense, counted, windows.clusters),
            )
        )
    summary = TextScores(**_summary(dense, windows, models.name(())))
    return TextResult(**description(windows), dense=summary, pruned=tuple(pruned))


def _score_shared(
    shared: SharedTokens, ids: Tensor, models: Sequence[Logits], positions: int
) -> list[Scores]:
    dense, *others = models
    narrowed = [shared.narrow(dense, dense=True)]
    for other in others:
        narrowed.append(shared.narrow(other, dense=False))
    return score_tokens(shared.places(ids), narrowed, positions)


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


class _Pace:
    """Moves the bar of a measurement, and soon says how long all windows take, if that is long."""

    def __init__(self, count: int, advance: Advance, notify: Notify) -> None:
        self._count = count
        self._advance = advance
        self._notify = notify
        self._began = time.monotonic()
        self._done = 0.0
        self._has_said = False

    def advance(self, done: float = 1, note: str = "") -> None:
        """Add finished windows or texts, maybe a fraction of one."""
        self._done += done
        self._advance(done, note)
        seconds = time.monotonic() - self._began
        if self._has_said or seconds < PACE_SECONDS:
            return
        self._has_said = True
        each = seconds / self._done
        if self._count > FEW_WINDOWS and each * self._count > LONG_SECONDS:
            whole = f"All {self._count:,} windows take about {format_seconds(each * self._count)}"
            few = format_seconds(each * FEW_WINDOWS)
            self._notify(Notice(f"{whole}; --max-windows {FEW_WINDOWS} takes about {few}."))

    def reach(self, done: int, note: str) -> None:
        """Add what is left of so many windows or texts, of which other processes read some."""
        self.advance(max(0.0, done - self._done), note)


class Scorer:
    """Runs models on the same windows or texts, the dense one first.

    `score` makes scores of the models' results for a batch; it holds so many positions at once.
    """

    def __init__(
        self,
        models: Models,
        sizes: Sequence[SizeKey],
        ids: Tokens,
        batch_size: int | None,
        opened: ExitStack,
        score: Callable[[Any, Sequence[Any], int], list[Scores]],
    ) -> None:
        self.models = models
        self.sizes = sizes
        self.opened = opened
        self.score = score
        self.skippable: dict[SizeKey, SkippableModel] = {}
        batch = batch_size or 1
        batches_per_part = max(1, TOKENS_PER_PART // usual_length(ids) // batch)
        self.parts = split(ids, batches_per_part * batch)
        self.dense, _ = self._model(())
        if not models.differ_in_blocks_alone:
            self._load_all()
        passes, _ = prepare_passes(
            self.dense,
            self.parts[0].to(self.dense.device),
            models.notify,
            memory=partial(available_memory, group=models.group),
            batch_size=batch_size,
            checked=CHECKED_TOKENS if isinstance(ids, Tensor) else None,
        )
        self.forks = passes.forks and self._others_fork()
        self.size = passes.budget.sequences
        self.positions = passes.budget.positions
        if not self.forks:
            self._load_all()

    def score_all(self, title: str, unit: str) -> list[Scores]:
        """Return the scores of each model on all windows or texts."""
        group = self.models.group
        together = self._parts_together()
        runs = [self.parts[at : at + together] for at in range(0, len(self.parts), together)]
        scored = []
        count = sum(map(len, self.parts))
        done = 0
        with task(self.models.notify, title, count, unit) as advance:
            self.pace = _Pace(count, advance, self.models.notify if unit == WINDOWS else ignore)
            for turn in deal(runs, group.size):
                mine = [self._score_run(run) for run in turn[group.rank]]
                for scores in group.gather_in_order(mine):
                    scored.append(scores)
                    done += len(next(iter(scores[0].values())))
                    note = ""
                    if "nll" in scores[0]:
                        loss = min(float(scores[0]["nll"].double().mean()), 700)
                        note = f"dense: {math.exp(loss):.2f} in the last windows"
                    self.pace.reach(done, note)
        return join_models(scored)

    def _parts_together(self) -> int:
        # If blocks are streamed, as many as there is memory for share a read of the weights.
        if self.dense.weights.resident:
            return 1
        dtype = self.models.placement.dtype
        needed = states_bytes(self.models.architecture, dtype, self.parts[0].numel())
        free = available_memory(CPU, self.models.group)
        return max(1, free // (needed * (len(self.sizes) + 1)))

    @torch.inference_mode()
    def _score_run(self, parts: Sequence[Any]) -> list[Scores]:
        def score(size: int) -> list[Scores]:
            self.size = size  # later parts begin with the size that fitted
            batches: list[Any] = []
            for windows in parts:
                batches += split(windows.to(self.dense.device), size)
            # Streamed weights are read once for all batches.
            groups = [[batch] for batch in batches] if self.dense.weights.resident else [batches]
            scored = []
            for group in groups:
                predict = self._predict if self.forks else self._predict_whole
                for ids, results in zip(group, predict(group), strict=True):
                    scored.append(self.score(ids, results, self.positions))
            return join_models(scored)

        device = self.models.placement.device
        notify = self.models.notify
        return in_smaller_pieces(score, self.size, device, notify, "continuing with {} windows")

    def _predict(self, batches: Sequence[Any]) -> list[list[Any]]:
        """Return the result of each model for each batch."""
        if self.models.differ_in_blocks_alone:
            return predict_together(self.dense, batches, self.sizes, self.pace.advance)
        predicted = predict_together(self.dense, batches, self.sizes[:1])
        for size in self.sizes[1:]:
            skippable, surgery = self._model(size)
            # All batches are predicted in here, since the model is whole again behind it.
            with surgery.simulate(skippable.model):
                own = [self.models.own_tokens(size, ids) for ids in batches]
                others = list(predict_together(skippable, own, [surgery.removals]))
            for of_batch, other in zip(predicted, others, strict=True):
                of_batch += other
        return predicted

    def _predict_whole(self, batches: Sequence[Any]) -> list[list[Any]]:
        """Return the result of each model for each batch; no model runs block by block."""
        predicted: list[list[Any]] = [[] for _ in batches]
        for size in self.sizes:
            skippable, surgery = self._model(size)
            with surgery.simulate(skippable.model):
                for of_batch, tokens in zip(predicted, batches, strict=True):
                    ids = self.models.own_tokens(size, tokens)
                    result = skippable.ending.of_model(skippable, ids, surgery.removals)
                    of_batch.append(result)
        return predicted

    def _others_fork(self) -> bool:
        # Another model may be of a class that does not run block by block.
        if not self.models.subject.compared or OTHER not in self.sizes:
            return True
        other, _ = self._model(OTHER)
        ids = self.models.own_tokens(OTHER, self.parts[0][:1, :CHECKED_TOKENS])
        with torch.inference_mode():
            return why_not_fork(other, ids.to(other.device)) is None

    def _load_all(self) -> None:
        # Before they run: no model is loaded in inference mode.
        for size in self.sizes:
            self._model(size)

    def _model(self, size: SizeKey) -> tuple[SkippableModel, Surgery]:
        # If two models may not fit into memory, the dense one stands in, with the surgery to make
        # on it.
        surgery = Surgery(self.models.architecture)
        if self.models.one_at_a_time and size and not self.models.subject.compared:
            surgery = self.models.surgeries[size]
            size = ()
        if size not in self.skippable:
            self.skippable[size] = self.opened.enter_context(self.models.without(size))
        return self.skippable[size], surgery
