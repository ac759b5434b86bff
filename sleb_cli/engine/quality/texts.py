"""Perplexity of a text and divergence from the dense model, token by token, for any number of sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import in_smaller_pieces
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.predictions import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel, sequences_fit
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
from sleb_cli.plan import Engine
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
    tokenizer: Any,
    batch_size: int | None,
    notify: Notify,
) -> TextResult:
    """Measure the dense model and each size on a text.

    Raises:
        ModelError: a loss is not finite.
    """
    dense, *pruned = _score_windows(windows, models, parts, batch_size, notify)
    counted, clusters = windows.counted, windows.clusters
    words, characters = windows.count_words(tokenizer)
    return TextResult(
        text=windows.text.source,
        windows=len(windows.ids),
        sequence_length=windows.ids.shape[1],
        stride=windows.stride,
        bos=windows.bos,
        tokens=int(counted.sum()),
        words=words,
        bytes=characters,
        clusters=len(set(clusters[counted].tolist())),
        clustered_by="documents" if windows.by_document else "windows",
        tokens_sha256=tokens_sha256(windows.ids),
        dense=TextScores(**_summary(dense, windows, words, characters, ())),
        pruned=tuple(
            PrunedTextScores(
                **_summary(scores, windows, words, characters, removals),
                **vars(paired_loss(scores, dense, counted, clusters)),
                removals=removals,
                divergence=divergence_record(scores, dense, counted, clusters),
            )
            for removals, scores in zip(models.sizes[1:], pruned, strict=True)
        ),
    )


def _summary(
    scores: TokenScores, windows: EvaluationWindows, words: int, characters: int, removals: tuple[int, ...]
) -> dict[str, Any]:
    counted, loss = windows.counted, mean_loss(scores, windows.counted)
    if not math.isfinite(loss) or loss > math.log(1e300):
        what = "dense model" if not removals else f"model without blocks {', '.join(map(str, removals))}"
        raise ModelError(f"The loss of the {what} on {windows.text.source} is {loss}.", hint="Try --dtype float32.")
    total = loss * int(counted.sum())

    def perplexity_per(units: int) -> float | None:
        return math.exp(total / units) if units and total / units < math.log(1e300) else None

    return {
        "perplexity": math.exp(loss),
        "word_perplexity": perplexity_per(words),
        "byte_perplexity": perplexity_per(characters),
        "bits_per_byte": total / characters / math.log(2) if characters else None,
        "calibration_error": expected_calibration_error(scores, counted),
        "losses": window_losses(scores, counted),
    }


def _score_windows(
    windows: EvaluationWindows, models: Models, parts: Parts, batch_size: int | None, notify: Notify
) -> list[TokenScores]:
    """Return the scores of each size, the dense model first; what is in the cache is not measured again."""
    per_part = max(1, TOKENS_OF_A_PART // windows.ids.shape[1])
    size = max(1, per_part // (batch_size or 1)) * (batch_size or 1)
    groups, found, cached = torch.split(windows.ids, size), [], 0
    what = f"Perplexity on {windows.text.source}"
    with _Scorer(models, batch_size, notify) as scorer, task(notify, what, len(windows.ids), "windows") as advance:
        for group in groups:
            keys = [_key(group, removals, batch_size) for removals in models.sizes]
            known = {key["removals"]: parts.tensors(key) for key in keys}
            missing = [removals for removals in models.sizes if known[_name(removals)] is None]
            if missing:
                scores = scorer.score(group, [removals for removals in missing if removals])
                for removals in missing:
                    parts.keep_tensors(_key(group, removals, batch_size), scores[removals].tensors())
                    known[_name(removals)] = scores[removals].tensors()
            cached += not missing
            found.append([TokenScores(**(known[_name(removals)] or {})) for removals in models.sizes])
            advance(len(group), _note(found[-1][0]))
    if cached == len(groups):
        notify(Notice(f"{what}: cached; --fresh measures again."))
    return [TokenScores.joined(of_size) for of_size in zip(*found, strict=True)]


def _key(group: Tensor, removals: tuple[int, ...], batch_size: int | None) -> dict[str, Any]:
    return {"removals": _name(removals), "tokens": tokens_sha256(group), "batch_size": batch_size}


def _name(removals: tuple[int, ...]) -> str:
    """Name a model; the order of removal does not matter."""
    return ",".join(map(str, sorted(removals)))


def _note(scores: TokenScores) -> str:
    return f"dense: {math.exp(min(float(scores.nll.double().mean()), 700)):.2f} in the last windows"


class _Scorer:
    """Runs the dense and the pruned models on the same windows; they are loaded for the first of them."""

    def __init__(self, models: Models, batch_size: int | None, notify: Notify) -> None:
        self._models, self._asked, self._notify = models, batch_size, notify
        self._stack = ExitStack()
        self._skippable: dict[tuple[int, ...], SkippableModel] = {}
        self._engine: Engine = "fork"
        self._size = self._positions = 0

    def __enter__(self) -> _Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @torch.inference_mode()
    def score(self, ids: Tensor, sizes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], TokenScores]:
        """Return the scores of the dense model, under no removals, and of these sizes."""
        ids = ids.to(self._models.device)
        models = [self._model(removals) for removals in ((), *sizes)]
        if not self._positions:
            passes, _ = prepare_passes(models[0][0], ids, self._notify, batch_size=self._asked, checked=CHECKED_TOKENS)
            self._engine, self._size, self._positions = passes.engine, passes.budget.sequences, passes.budget.positions
        found = in_smaller_pieces(lambda size: self._score(ids, models, size), self._size, self._reduced)
        by_size = (TokenScores.joined(parts) for parts in zip(*found, strict=True))
        return dict(zip(((), *sizes), by_size, strict=True))

    def _score(
        self, ids: Tensor, models: Sequence[tuple[SkippableModel, tuple[int, ...]]], size: int
    ) -> list[list[TokenScores]]:
        found = []
        for batch in torch.split(ids, size):
            with sequences_fit(batch.shape, batch.device):
                dense, *pruned = (Predictions(skippable, batch, removed, self._engine) for skippable, removed in models)
                scores, others = score_tokens(batch, dense, pruned, self._positions)
                found.append([scores, *others])
        return found

    def _reduced(self, size: int) -> None:
        self._size = size
        self._notify(Notice(f"Out of memory on {self._models.device}; continuing with {size} windows at once."))

    def _model(self, removals: tuple[int, ...]) -> tuple[SkippableModel, tuple[int, ...]]:
        """Return a model and the blocks to skip in it.

        Two models with packed weights may not fit into memory, so there blocks are skipped in the dense one.
        """
        skipped = removals if self._models.architecture.is_quantized else ()
        model = self._models.without(() if skipped else removals)
        if (loaded := () if skipped else removals) not in self._skippable:
            blocks = self._models.architecture.blocks_of(model)
            self._skippable[loaded] = self._stack.enter_context(SkippableModel(model, blocks))
        return self._skippable[loaded], skipped
