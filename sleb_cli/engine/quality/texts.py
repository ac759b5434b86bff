"""Perplexity of a text and divergence from the dense model, token by token, for any number of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sleb_cli.engine.device import CPU, in_smaller_pieces
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.predictions import Logits, predict, predict_together
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel, explain_out_of_memory
from sleb_cli.engine.process_group import deal
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.token_scores import FORMAT, Scores, divergence_record, joined, score_tokens, window_losses
from sleb_cli.engine.statistics import clustered_mean
from sleb_cli.engine.text.windows import EvaluationWindows, tokens_sha256
from sleb_cli.events import Notice, task
from sleb_cli.results import PrunedTextScores, TextResult, TextScores
from sleb_plugins import ModelError

# On how many tokens of a window it is checked that the model may be run block by block.
CHECKED_TOKENS = 128

# About how many tokens make a part, so that an interrupted evaluation loses a minute or so.
TOKENS_OF_A_PART = 16_384


def measure_text(windows: EvaluationWindows, models: Models, batch_size: int | None) -> TextResult:
    """Measure the dense model and each size on a text, whose windows processes share out.

    If `batch_size` is None, a batch has as many windows as suit the device.

    Raises:
        ModelError: a loss is not finite.
    """
    with ExitStack() as opened:
        dense, *pruned = _Scorer(models, batch_size, opened).scores(windows)
    counted, clusters = windows.counted, windows.clusters

    def compared(removals: tuple[int, ...], scores: Scores) -> PrunedTextScores:
        # The tokens of a cluster are one observation.
        change = clustered_mean((scores["nll"].double() - dense["nll"].double())[counted], clusters[counted])
        return PrunedTextScores(
            **_summary(scores, windows, removals),
            removals=removals,
            log_ratio=change.mean,
            standard_error=change.standard_error,
            interval=change.interval,
            divergence=divergence_record(scores, dense, counted, clusters),
        )

    return TextResult(
        text=windows.text.source,
        windows=len(windows.ids),
        sequence_length=windows.ids.shape[1],
        bos=windows.bos,
        tokens=int(counted.sum()),
        clusters=len(set(clusters[counted].tolist())),
        clustered_by=windows.clustered_by,
        tokens_sha256=tokens_sha256(windows.ids),
        dense=TextScores(**_summary(dense, windows, ())),
        pruned=tuple(map(compared, models.sizes[1:], pruned)),
    )


def _summary(scores: Scores, windows: EvaluationWindows, removals: tuple[int, ...]) -> dict[str, Any]:
    counted = windows.counted
    loss = float(scores["nll"][counted].double().mean())
    if not math.isfinite(loss) or loss > math.log(1e300):
        what = "dense model" if not removals else f"model without blocks {', '.join(map(str, removals))}"
        raise ModelError(f"The loss of the {what} on {windows.text.source} is {loss}.", hint="Try --dtype float32.")
    return {"perplexity": math.exp(loss), "losses": window_losses(scores, counted)}


_Found = dict[tuple[int, ...], Scores | None]
"""The scores of each size on some windows; None if they are not known yet."""


def _note(known: _Found) -> str:
    dense = known[()] or {}
    return f"dense: {math.exp(min(float(dense['nll'].double().mean()), 700)):.2f} in the last windows"


class _Scorer:
    """Runs the dense and the pruned models on the same windows; they are loaded when first needed."""

    def __init__(self, models: Models, batch_size: int | None, opened: ExitStack) -> None:
        self.models, self.batch_size, self.opened = models, batch_size, opened
        self.skippable: dict[tuple[int, ...], SkippableModel] = {}

    def scores(self, windows: EvaluationWindows) -> list[Scores]:
        """Return the scores of each size, the dense model first; what is in the cache is not measured again."""
        models, group, batch = self.models, self.models.group, self.batch_size or 1
        per_part = max(1, TOKENS_OF_A_PART // windows.ids.shape[1])
        stretches = torch.split(windows.ids, max(1, per_part // batch) * batch)
        common = {"format": FORMAT, "batch_size": self.batch_size}
        keys = [{**common, "tokens": tokens_sha256(ids)} for ids in stretches]
        found: list[_Found] = group.from_main(
            lambda: [{removals: models.cached(removals, load, **key) for removals in models.sizes} for key in keys]
        )
        gaps = [[removals for removals, scores in known.items() if scores is None] for known in found]
        missing = [number for number, sizes in enumerate(gaps) if sizes]
        what = f"Perplexity on {windows.text.source}"
        with task(models.notify, what, len(windows.ids), "windows") as advance:
            for ids, known, sizes in zip(stretches, found, gaps, strict=True):
                if not sizes:
                    advance(len(ids), _note(known))
            together = self._prepare(stretches[missing[0]], gaps[missing[0]]) if missing else 1
            runs = [missing[first : first + together] for first in range(0, len(missing), together)]
            for turn in deal(runs, group.size):
                mine = (scored for run in turn[group.rank] for scored in self._measured(stretches, gaps, run))
                for _, (number, scores) in group.in_turn(mine):
                    for removals, own in scores.items():
                        content = save({name: tensor.contiguous() for name, tensor in own.items()})
                        models.cache(removals, content, **keys[number])
                    found[number] |= scores
                    advance(len(stretches[number]), _note(found[number]))
        if not missing:
            models.notify(Notice(f"{what}: cached; --fresh measures again."))
        return [joined([known[removals] or {} for known in found]) for removals in models.sizes]

    def _prepare(self, ids: Tensor, sizes: Sequence[tuple[int, ...]]) -> int:
        """Load the dense model and these sizes, and choose how many windows a batch has.

        Return how many stretches are scored together: if blocks are streamed, as many as there is memory for.
        """
        dense, *_ = [self._model(removals)[0] for removals in ((), *sizes)]
        passes, _ = prepare_passes(
            dense,
            ids.to(dense.device),
            self.models.notify,
            memory=self._memory,
            batch_size=self.batch_size,
            checked=CHECKED_TOKENS,
        )
        self.forks, self.size, self.positions = passes.forks, passes.budget.sequences, passes.budget.positions
        if dense.weights.resident:
            return 1
        width: int = self.models.architecture.text_config.hidden_size
        needed = ids.numel() * width * self.models.placement.dtype.itemsize * (len(self.models.sizes) + 1)
        return max(1, self._memory(CPU) // needed)

    def _memory(self, device: torch.device) -> int:
        """Return how much memory may be used: the same in all processes, so that they have the same batches."""
        return min(self.models.group.gather(available_memory(device)))

    @torch.inference_mode()
    def _measured(
        self, stretches: Sequence[Tensor], gaps: Sequence[Sequence[tuple[int, ...]]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, dict[tuple[int, ...], Scores]]]:
        """Yield the number of each of these stretches, and the scores of the sizes that it lacks."""
        sizes = [(), *dict.fromkeys(size for number in numbers for size in gaps[number] if size)]
        models = [self._model(removals) for removals in sizes]
        dense = models[0][0]
        windows = [stretches[number].to(dense.device) for number in numbers]

        def score(size: int) -> list[list[list[Scores]]]:
            batches = [batch for ids in windows for batch in torch.split(ids, size)]
            predicted: Iterator[list[Logits]] = (
                [predict(skippable, batch, removed, forks=self.forks) for skippable, removed in models]
                for batch in batches
            )
            if not dense.weights.resident:
                predicted = predict_together(dense, batches, [removed for _, removed in models])

            def score_batch(batch: Tensor) -> list[Scores]:
                with explain_out_of_memory(batch.shape, batch.device):
                    return score_tokens(batch, next(predicted), self.positions)

            return [[score_batch(batch) for batch in torch.split(ids, size)] for ids in windows]

        def reduced(size: int) -> None:
            self.size = size
            device = self.models.placement.device
            self.models.notify(Notice(f"Out of memory on {device}; continuing with {size} windows at a time."))

        for number, batches in zip(numbers, in_smaller_pieces(score, self.size, reduced), strict=True):
            scores = [joined(of_size) for of_size in zip(*batches, strict=True)]
            yield number, {size: own for size, own in zip(sizes, scores, strict=True) if size in gaps[number]}

    def _model(self, removals: tuple[int, ...]) -> tuple[SkippableModel, tuple[int, ...]]:
        """Load a model, or if two may not fit into memory, the dense one; return it with the blocks to skip in it."""
        skipped = removals if self.models.is_single else ()
        if (loaded := () if skipped else removals) not in self.skippable:
            self.skippable[loaded] = self.opened.enter_context(self.models.without(loaded))
        return self.skippable[loaded], skipped
