"""Healing of a model that only reads: to put out, for a text, what the dense model does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb_cli.engine.device import cpu_dtypes
from sleb_cli.engine.forward.ending import Reader
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.padded import PaddedTexts
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.training import TransferSet
from sleb_cli.engine.recovery.variant import Losses, Variant
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.passages import sort_in_runs
from sleb_cli.events import Notify, ignore, task

BATCH_TEXTS = 16
"""In a step. In the same time, 32 come a little less near, as they take half as many steps."""
READ_TEXTS = 32
"""How many texts are read at once."""


@dataclass(frozen=True)
class OutputBatch:
    """Texts, and what the dense model puts out for them, [texts, width]."""

    texts: PaddedTexts
    dense: Tensor

    @property
    def targets(self) -> int:
        """How many outputs count."""
        return len(self.dense)

    @property
    def tokens(self) -> int:
        """How many tokens the texts have."""
        return int(self.texts.mask.sum())

    def split(self, size: int) -> list[OutputBatch]:
        """Cut into batches of `size` texts."""
        pieces = zip(self.texts.split(size), torch.split(self.dense, size), strict=True)
        return [OutputBatch(*piece) for piece in pieces]


@dataclass(frozen=True)
class OutputDistillation:
    """A student that learns to put out what the dense model does."""

    student: SkippableModel

    def divergence(self, batch: OutputBatch) -> float:
        """Sum the distances of the texts."""
        return float(self._distances(batch).sum())

    def add_gradient(self, batch: OutputBatch, scale: float = 1.0) -> float:
        """Add `scale` times the mean distance's gradient to the student's; return that distance."""
        distances = self._distances(batch)
        gradient = torch.full_like(distances, scale / len(distances))
        self.student.backward(distances, gradient, batch.texts.shape)
        return float(distances.detach().mean())

    def _distances(self, batch: OutputBatch) -> Tensor:
        outputs = read(Variant(self.student), batch.texts)
        return _ending(self.student).distance(outputs, batch.dense)


class OutputSet(TransferSet):
    """Texts in batches of like length, in another order each time they are read."""

    size = BATCH_TEXTS
    measure = "distance from the dense model"

    def __init__(self, job: Job, student: SkippableModel) -> None:
        self.distillation = OutputDistillation(student)
        self._seed = job.settings.splits[0].seed
        self._texts = job.train.sequences.to(student.device)
        dense = Variant(job.dense)
        what = f"Reading {len(self._texts):,} texts with the dense model"
        self._dense = read_all(dense, self._texts, job.notify, what)
        self.checked = {}
        validation = job.validation.to(student.device)
        for source, (texts, _) in validation.first_of_each(len(validation.sequences)).items():
            self.checked[source] = OutputBatch(texts, read_all(dense, texts)).split(READ_TEXTS)

    def batches(self, portion: int, begin: int, notify: Notify) -> Iterator[OutputBatch]:
        """Return all texts once, from batch `begin / size` on."""
        order = torch.tensor(sort_in_runs(self._texts, self._seed + portion))
        batches = list(torch.split(order, self.size))
        random.Random(f"{self._seed}/{portion}").shuffle(batches)
        return map(self._batch, batches[begin // self.size :])

    def _batch(self, rows: Tensor) -> OutputBatch:
        return OutputBatch(self._texts[rows].trimmed(), self._dense[rows])


class OutputComparison:
    """Compares variants of a model with the dense one on texts."""

    def __init__(self, dense: Variant, text: Calibration) -> None:
        self._texts = text.sequences.to(dense.skippable.device)
        self._dense = read_all(dense, self._texts)

    @torch.inference_mode()
    def losses(self, variant: Variant) -> Losses:
        """Return the mean distance, which is the loss, too."""
        outputs = read_all(variant, self._texts)
        distance = float(_ending(variant.skippable).distance(outputs, self._dense).mean())
        return Losses(distance, distance)


@torch.no_grad()
def read_all(
    variant: Variant, texts: PaddedTexts, notify: Notify = ignore, what: str = ""
) -> Tensor:
    """Run a model on texts; return its outputs, [texts, width]."""
    order = texts.mask.sum(1).argsort(stable=True)
    outputs = []
    with task(notify, what, len(texts)) as advance:
        for batch in texts[order].split(READ_TEXTS):
            outputs.append(read(variant, batch))
            advance(len(batch))
    return torch.cat(outputs)[order.argsort()]


def read(variant: Variant, texts: PaddedTexts) -> Tensor:
    """Run a model on a batch of texts, with matrices in bfloat16 where that is faster."""
    skippable = variant.skippable
    with _mixed_precision(skippable.device), skippable.replaced(variant.parameters):
        return _ending(skippable).of_model(skippable, texts, variant.removed).float()


def _mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    fast = device.type != "cpu" or torch.bfloat16 in cpu_dtypes()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def _ending(model: SkippableModel) -> Reader:
    assert isinstance(model.ending, Reader)
    return model.ending
