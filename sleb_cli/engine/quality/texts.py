"""Perplexity of a text and divergence from the dense model, token by token, for any number of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU, in_smaller_pieces
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.predictions import Predictions, predict, predict_together
from sleb_cli.engine.forward.skipping import SkippableModel, sequences_fit
from sleb_cli.engine.process_group import ProcessGroup, deal
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.parts import Parts
from sleb_cli.engine.quality.token_scores import (
    TokenScores,
    divergence_record,
    expected_calibration_error,
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


def measure_text(
    windows: EvaluationWindows,
    models: Models,
    parts: Parts,
    batch_size: int | None,
    group: ProcessGroup,
    notify: Notify,
) -> TextResult:
    """Measure the dense model and each size on a text, whose parts the processes share out.

    Raises:
        ModelError: a loss is not finite.
    """
    dense, *pruned = _score_windows(windows, models, parts, batch_size, group, notify)
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
                **vars(paired_loss(scores, dense, counted, clusters)),
                removals=removals,
                divergence=divergence_record(scores, dense, counted, clusters),
            )
            for removals, scores in zip(models.sizes[1:], pruned, strict=True)
        ),
    )


def _summary(scores: TokenScores, windows: EvaluationWindows, removals: tuple[int, ...]) -> dict[str, Any]:
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


def _score_windows(
    windows: EvaluationWindows,
    models: Models,
    parts: Parts,
    batch_size: int | None,
    group: ProcessGroup,
    notify: Notify,
) -> list[TokenScores]:
    """Return the scores of each size, the dense model first; what is in the cache is not measured again."""
    per_part = max(1, TOKENS_OF_A_PART // windows.ids.shape[1])
    size = max(1, per_part // (batch_size or 1)) * (batch_size or 1)
    stretches, what = torch.split(windows.ids, size), f"Perplexity on {windows.text.source}"

    def cached() -> list[_Found]:
        return [
            {removals: parts.tensors(_key(ids, removals, batch_size)) for removals in models.sizes} for ids in stretches
        ]

    found = group.from_main(cached)
    missing = {number: gaps for number, known in enumerate(found) if (gaps := _gaps(known))}
    with (
        _Scorer(models, batch_size, group, notify) as scorer,
        task(notify, what, len(windows.ids), "windows") as advance,
    ):
        for number, known in enumerate(found):
            if number not in missing:
                advance(len(stretches[number]), _note(known))
        together = scorer.prepare(stretches[min(missing)], missing[min(missing)]) if missing else 1
        numbers = list(missing)
        runs = [numbers[first : first + together] for first in range(0, len(numbers), together)]
        for turn in deal(runs, group.size):
            mine = (scored for run in turn[group.rank] for scored in scorer.score(stretches, missing, run))
            for _, (number, scores) in group.in_turn(mine):
                for removals, tensors in scores.items():
                    parts.keep_tensors(_key(stretches[number], removals, batch_size), tensors)
                found[number] |= scores
                advance(len(stretches[number]), _note(found[number]))
    if not missing:
        notify(Notice(f"{what}: cached; --fresh measures again."))
    return [TokenScores.joined([TokenScores(**(known[size] or {})) for known in found]) for size in models.sizes]


_Found = dict[tuple[int, ...], dict[str, Tensor] | None]
"""The tensors of token scores of each size on some windows; None where they are not known yet."""


def _gaps(known: _Found) -> list[tuple[int, ...]]:
    return [removals for removals, tensors in known.items() if tensors is None]


def _key(group: Tensor, removals: tuple[int, ...], batch_size: int | None) -> dict[str, Any]:
    return {"removals": _name(removals), "tokens": tokens_sha256(group), "batch_size": batch_size}


def _name(removals: tuple[int, ...]) -> str:
    """Name a model; the order of removal does not matter."""
    return ",".join(map(str, sorted(removals)))


def _note(known: _Found) -> str:
    dense = known[()] or {}
    return f"dense: {math.exp(min(float(dense['nll'].double().mean()), 700)):.2f} in the last windows"


class _Scorer:
    """Runs the dense and the pruned models on the same windows; they are loaded for the first of them."""

    def __init__(self, models: Models, batch_size: int | None, group: ProcessGroup, notify: Notify) -> None:
        self._models, self._asked, self._group, self._notify = models, batch_size, group, notify
        self._stack = ExitStack()
        self._skippable: dict[tuple[int, ...], SkippableModel] = {}
        self._forks = True
        self._size = self._positions = 0

    def __enter__(self) -> _Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def prepare(self, ids: Tensor, sizes: Sequence[tuple[int, ...]]) -> int:
        """Load the dense model and these sizes, and choose how many of these windows are scored at once.

        Return how many parts are scored together: if blocks are streamed, as many as there is memory for.
        """
        dense, *_ = [self._model(removals)[0] for removals in ((), *sizes)]
        # The same in all processes, so that they have the same batches.
        memory = min(self._group.gather(min(available_memory(place, None) for place in dense.devices)))
        passes, _ = prepare_passes(
            dense,
            ids.to(dense.device),
            self._notify,
            memory=str(memory),
            batch_size=self._asked,
            checked=CHECKED_TOKENS,
        )
        self._forks, self._size, self._positions = passes.forks, passes.budget.sequences, passes.budget.positions
        if dense.weights.resident:
            return 1
        width: int = self._models.architecture.text_config.hidden_size
        needed = ids.numel() * width * self._models.placement.dtype.itemsize * (len(self._models.sizes) + 1)
        return max(1, min(self._group.gather(available_memory(CPU, None))) // needed)

    @torch.inference_mode()
    def score(
        self,
        parts: Sequence[Tensor],
        missing: Mapping[int, Sequence[tuple[int, ...]]],
        numbers: Sequence[int],
    ) -> Iterator[tuple[int, dict[tuple[int, ...], dict[str, Tensor]]]]:
        """Yield the number of each of these parts, and the tensors of token scores of the sizes that it lacks."""
        sizes = [(), *dict.fromkeys(size for number in numbers for size in missing[number] if size)]
        models = [self._model(removals) for removals in sizes]
        windows = [parts[number].to(models[0][0].device) for number in numbers]
        found = in_smaller_pieces(lambda size: self._score(windows, models, size), self._size, self._reduced)
        for number, batches in zip(numbers, found, strict=True):
            scored = [TokenScores.joined(of_size).tensors() for of_size in zip(*batches, strict=True)]
            yield (
                number,
                {size: tensors for size, tensors in zip(sizes, scored, strict=True) if size in missing[number]},
            )

    def _score(
        self, windows: Sequence[Tensor], models: Sequence[tuple[SkippableModel, tuple[int, ...]]], size: int
    ) -> list[list[list[TokenScores]]]:
        """Return the scores of each model on each batch of each part."""
        batches = [torch.split(ids, size) for ids in windows]
        predicted = self._predictions([batch for of_part in batches for batch in of_part], models)
        return [[self._score_batch(batch, next(predicted)) for batch in of_part] for of_part in batches]

    def _predictions(
        self, batches: Sequence[Tensor], models: Sequence[tuple[SkippableModel, tuple[int, ...]]]
    ) -> Iterator[list[Predictions]]:
        """Yield the predictions of each model on one batch after another."""
        dense, removals = models[0][0], [removed for _, removed in models]
        if not dense.weights.resident:
            with sequences_fit(batches[0].shape, dense.device):
                yield from predict_together(dense, batches, removals)
            return
        for batch in batches:
            with sequences_fit(batch.shape, batch.device):
                predicted = [predict(skippable, batch, removed, forks=self._forks) for skippable, removed in models]
            yield predicted

    def _score_batch(self, batch: Tensor, predicted: Sequence[Predictions]) -> list[TokenScores]:
        with sequences_fit(batch.shape, batch.device):
            dense, others = score_tokens(batch, predicted[0], predicted[1:], self._positions)
        return [dense, *others]

    def _reduced(self, size: int) -> None:
        self._size = size
        device = self._models.placement.device
        self._notify(Notice(f"Out of memory on {device}; continuing with {size} windows at once."))

    def _model(self, removals: tuple[int, ...]) -> tuple[SkippableModel, tuple[int, ...]]:
        """Return a model and the blocks to skip in it.

        If models do not share weights, two may not fit into memory, so blocks are skipped in the dense one.
        """
        skipped = removals if self._models.is_single else ()
        if (loaded := () if skipped else removals) not in self._skippable:
            self._skippable[loaded] = self._stack.enter_context(self._models.without(loaded))
        return self._skippable[loaded], skipped
