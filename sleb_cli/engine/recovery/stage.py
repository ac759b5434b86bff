"""The stages of a recovery, each of which gives the kept blocks new values.

A new way to recover is a `Stage` in a file of its own, an option in `requests.py`, a branch in
`door/recovery.py`, and a record in `plan.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery.saved_state import SavedState
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import Notify, ignore
from sleb_cli.plan import LossesRecord

HIDDEN_STATES = "hidden states"
"""A use of memory that may move to the host if the device has too little."""


@dataclass(frozen=True)
class RecoverySettings:
    """A resolved recovery.

    Attributes:
        placement: where the dense model is, and in which data type it computes.
        stored: the data type to which values are rounded.
        on_host: whether hidden states wait in the CPU's memory, because the device has too little.
        splits: the texts for training, validation and test.
        output: the folder to be written; the state of the recovery is saved next to it.
        kept_bytes: how many bytes that state may still take.
    """

    surgery: Surgery
    stages: tuple[Stage, ...]
    placement: Placement
    stored: torch.dtype
    on_host: bool
    splits: Sequence[CalibrationSettings]
    output: Path
    kept_bytes: int


@dataclass(frozen=True)
class Job:
    """A recovery at work: the model, texts and saved state that each stage takes.

    Attributes:
        dense: the dense model, as an entered context; a stage leaves its parameters as they were.
        train: the text to fit to.
        validation: the text that decides, and is never fitted to.
        state: where a stage keeps its values, and finds an interrupted run's.
    """

    settings: RecoverySettings
    dense: SkippableModel
    train: Calibration
    validation: Calibration
    state: SavedState
    notify: Notify = ignore


class Stage(ABC):
    """A way to give the kept blocks new values, with its settings.

    Attributes:
        title: its name in messages.
        task: its name as a task.
        model: the name of the model with its values in messages.
        key: the field of `ConversationsRecord` that this stage fills.
        streams: whether the blocks may stay in the files.
    """

    title: ClassVar[str]
    task: ClassVar[str]
    model: ClassVar[str]
    key: ClassVar[str]
    streams: ClassVar[bool]

    @abstractmethod
    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of memory that it takes besides the dense model, by their use."""

    @abstractmethod
    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes that it keeps on the disk at most."""

    @abstractmethod
    def run(self, job: Job, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Return new values by parameter name in the dense model, and the record of the stage.

        `values` come from earlier stages, and are among the new ones.
        """

    @abstractmethod
    def fields(self, done: Any, losses: LossesRecord) -> dict[str, Any]:
        """Return its fields of a `RecoveryRecord`, from what `run` recorded and the new losses."""


def kept_blocks(surgery: Surgery) -> list[nn.Module]:
    """Return the blocks that stay, without their weights."""
    blocks = surgery.architecture.blocks_of(surgery.architecture.skeleton)
    return [blocks[block] for block in surgery.kept.blocks]


def whole_model(dense: SkippableModel) -> Any:
    """Return the dense model with no block skipped, so that it can write text."""
    dense.skip(())
    return dense.model
