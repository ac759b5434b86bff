"""Perplexity of a text and divergence from the dense model, token by token, for any number of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sleb_cli.engine.device import CPU, in_smaller_pieces
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.predictions import Logits, predict, predict_together
from sleb_cli.engine.forward.skipping import SkippableModel, sequences_fit
from sleb_cli.engine.process_group import ProcessGroup, deal
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.parts import Parts
from sleb_cli.engine.quality.token_scores import (
    Scores,
    divergence_record,
    expected_calibration_error,
    joined,
    mean_loss,
    paired_loss,
    score_tokens,
    window_losses,
)
from sleb_cli.engine.text.windows import EvaluationWindows, tokens_sha256
from sleb_cli.events import Notice, Notify, task
from sleb_cli.results import PrunedTextScores, TextResult, TextScores
from sleb_plugins import ModelError

# On how many tokens of a window it is checked that the model may be run block by block.
CHECKED_TOKENS = 128

# About how many tokens make a part, so that an interrupted evaluation loses a minute or so.
TOKENS_OF_A_PART = 16_384


def measure_texts(
    texts: Sequence[EvaluationWindows],
    models: Models,
    parts: Parts,
    batch_size: int | None,
    group: ProcessGroup,
    notify: Notify,
) -> tuple[TextResult, ...]:
    """Measure the dense model and each size on texts, which processes share out.

    If `batch_size` is None, a batch has as many windows as suit the device.

    Raises:
        ModelError: a loss is not finite.
    """
    with ExitStack() as loaded:
        scorer = _Scorer(models, parts, batch_size, group, notify, loaded)
        return tuple(_measure(windows, scorer) for windows in texts)


def _measure(windows: EvaluationWindows, scorer: _Scorer) -> TextResult:
    dense, *pruned = scorer.scores(windows)
    counted, clusters = windows.counted, windows.clusters
    return TextResult(
        text=windows.text.source,
        windows=len(windows.ids),
        sequence_length=windows.ids.shape[1],
        stride=windows.stride,
        bos=windows.bos,
        tokens=int(counted.sum()),
        words=windows.words,
        bytes=windows.bytes,
        clusters=len(set(clusters[counted].tolist())),
        clustered_by="documents" if windows.by_document else "windows",
        tokens_sha256=tokens_sha256(windows.ids),
        dense=TextScores(**_summary(dense, windows, ())),
        pruned=tuple(
            PrunedTextScores(
                **_summary(scores, windows, removals),
                removals=removals,
                log_ratio=(change := paired_loss(scores, dense, counted, clusters)).mean,
                standard_error=change.standard_error,
                interval=change.interval,
                divergence=divergence_record(scores, dense, counted, clusters),
            )
            for removals, scores in zip(scorer.models.sizes[1:], pruned, strict=True)
        ),
    )


def _summary(scores: Scores, windows: EvaluationWindows, removals: tuple[int, ...]) -> dict[str, Any]:
    counted, loss = windows.counted, mean_loss(scores, windows.counted)
    if not math.isfinite(loss) or loss > math.log(1e300):
        what = "dense model" if not removals else f"model without blocks {', '.join(map(str, removals))}"
        raise ModelError(f"The loss of the {what} on {windows.text.source} is {loss}.", hint="Try --dtype float32.")
    total = loss * int(counted.sum())

    def perplexity_per(units: int) -> float | None:
        return math.exp(total / units) if units and total / units < math.log(1e300) else None

    return {
        "perplexity": math.exp(loss),
        "word_perplexity": perplexity_per(windows.words),
        "byte_perplexity": perplexity_per(windows.bytes),
        "bits_per_byte": total / windows.bytes / math.log(2) if windows.bytes else None,
        "calibration_error": expected_calibration_error(scores, counted),
        "losses": window_losses(scores, counted),
    }


_Found = dict[tuple[int, ...], Scores | None]
"""The scores of each size on some windows; None if they are not known yet."""


def _note(known: _Found) -> str:
    dense = known[()] or {}
    return f"dense: {math.exp(min(float(dense['nll'].double().mean()), 700)):.2f} in the last windows"


_Loaded = tuple[SkippableModel, tuple[int, ...]]
"""A model, and the blocks to skip in it."""


@dataclass
class _Scorer:
    """Runs the dense and the pruned models on the same windows; they are loaded when first needed."""

    models: Models
    parts: Parts
    batch_size: int | None
    group: ProcessGroup
    notify: Notify
    loaded: ExitStack
    skippable: dict[tuple[int, ...], SkippableModel] = field(default_factory=dict)

    def scores(self, windows: EvaluationWindows) -> list[Scores]:
        """Return the scores of each size, the dense model first; what is in the cache is not measured again."""
        per_part, batch = max(1, TOKENS_OF_A_PART // windows.ids.shape[1]), self.batch_size or 1
        stretches = torch.split(windows.ids, max(1, per_part // batch) * batch)
        what = f"Perplexity on {windows.text.source}"
        found = self.group.from_main(lambda: list(map(self._cached, stretches)))
        missing = {
            number: gaps
            for number, known in enumerate(found)
            if (gaps := [removals for removals, scores in known.items() if scores is None])
        }
        with task(self.notify, what, len(windows.ids), "windows") as advance:
            for number, known in enumerate(found):
                if number not in missing:
                    advance(len(stretches[number]), _note(known))
            together = self._prepare(stretches[min(missing)], missing[min(missing)]) if missing else 1
            numbers = list(missing)
            runs = [numbers[first : first + together] for first in range(0, len(numbers), together)]
            for turn in deal(runs, self.group.size):
                mine = (scored for run in turn[self.group.rank] for scored in self._measured(stretches, missing, run))
                for _, (number, scores) in self.group.in_turn(mine):
                    for removals, own in scores.items():
                        content = save({name: tensor.contiguous() for name, tensor in (own or {}).items()})
                        self.parts.write(self._key(stretches[number], removals), content)
                    found[number] |= scores
                    advance(len(stretches[number]), _note(found[number]))
        if not missing:
            self.notify(Notice(f"{what}: cached; --fresh measures again."))
        return [joined([known[removals] or {} for known in found]) for removals in self.models.sizes]

    def _cached(self, ids: Tensor) -> _Found:
        return {removals: self.parts.read(self._key(ids, removals), load) for removals in self.models.sizes}

    def _key(self, ids: Tensor, removals: tuple[int, ...]) -> dict[str, Any]:
        # The order of removal does not matter.
        name = ",".join(map(str, sorted(removals)))
        return {"removals": name, "tokens": tokens_sha256(ids), "batch_size": self.batch_size}

    def _prepare(self, ids: Tensor, sizes: Sequence[tuple[int, ...]]) -> int:
        """Load the dense model and these sizes, and choose how many windows a batch has.

        Return how many stretches are scored together: if blocks are streamed, as many as there is memory for.
        """
        dense, *_ = [self._model(removals)[0] for removals in ((), *sizes)]
        passes, _ = prepare_passes(
            dense,
            ids.to(dense.device),
            self.notify,
            memory=self._memory,
            batch_size=self.batch_size,
            checked=CHECKED_TOKENS,
        )
        self._forks, self._size, self._positions = passes.forks, passes.budget.sequences, passes.budget.positions
        if dense.weights.resident:
            return 1
        width: int = self.models.architecture.text_config.hidden_size
        needed = ids.numel() * width * self.models.placement.dtype.itemsize * (len(self.models.sizes) + 1)
        return max(1, self._memory(CPU) // needed)

    def _memory(self, device: torch.device) -> int:
        """Return how much memory may be used: the same in all processes, so that they have the same batches."""
        return min(self.group.gather(available_memory(device)))

    @torch.inference_mode()
    def _measured(
        self,
        stretches: Sequence[Tensor],
        missing: Mapping[int, Sequence[tuple[int, ...]]],
        numbers: Sequence[int],
    ) -> Iterator[tuple[int, _Found]]:
        """Yield the number of each of these stretches, and the scores of the sizes that it lacks."""
        sizes = [(), *dict.fromkeys(size for number in numbers for size in missing[number] if size)]
        models = [self._model(removals) for removals in sizes]
        windows = [stretches[number].to(models[0][0].device) for number in numbers]

        def of_each(size: int) -> list[list[list[Scores]]]:
            batches = [torch.split(ids, size) for ids in windows]
            scored = self._score([batch for of_part in batches for batch in of_part], models)
            return [[next(scored) for _ in of_part] for of_part in batches]

        for number, batches in zip(numbers, in_smaller_pieces(of_each, self._size, self._reduced), strict=True):
            scores = [joined(of_size) for of_size in zip(*batches, strict=True)]
            yield number, {size: own for size, own in zip(sizes, scores, strict=True) if size in missing[number]}

    def _score(self, batches: Sequence[Tensor], models: Sequence[_Loaded]) -> Iterator[list[Scores]]:
        """Yield the scores of each model on one batch after another."""
        dense = models[0][0]
        predicted: Iterator[list[Logits]]
        if dense.weights.resident:
            predicted = (
                [predict(skippable, batch, removed, forks=self._forks) for skippable, removed in models]
                for batch in batches
            )
        else:
            predicted = predict_together(dense, batches, [removed for _, removed in models])
        for batch in batches:
            with sequences_fit(batch.shape, batch.device):
                scores = score_tokens(batch, next(predicted), self._positions)
            yield scores

    def _reduced(self, size: int) -> None:
        self._size = size
        device = self.models.placement.device
        self.notify(Notice(f"Out of memory on {device}; continuing with {size} windows at once."))

    def _model(self, removals: tuple[int, ...]) -> _Loaded:
        """Load a model, or if two may not fit into memory, the dense one, whose blocks are then skipped."""
        skipped = removals if self.models.is_single else ()
        if (loaded := () if skipped else removals) not in self.skippable:
            self.skippable[loaded] = self.loaded.enter_context(self.models.without(loaded))
        return self.skippable[loaded], skipped
