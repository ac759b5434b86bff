"""What a recovery is made of: stages, each of which gives the kept blocks new values.

A new way to recover is a `Stage` in a file of its own, its option in `requests.py`, its row in `door/recovery.py`, and
its record in `plan.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.unfinished import Unfinished
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import Notify, ignore
from sleb_cli.plan import LossesRecord

HIDDEN_STATES = "hidden states"
"""A need for memory that the host's can meet if a device's cannot."""


@dataclass(frozen=True)
class RecoverySettings:
    """A recovery that is decided.

    Attributes:
        surgery: the removal.
        stages: what gives the kept blocks new values, in order.
        placement: where the dense model is, and in which data type it computes.
        stored: the data type to which values are rounded.
        on_host: whether hidden states wait in the memory of the CPU, because the device has too little.
        splits: the texts for training, validation and test.
        state: the folder that keeps values until the output is written.
        kept_bytes: how many bytes that folder may still take.
    """

    surgery: Surgery
    stages: tuple[Stage, ...]
    placement: Placement
    stored: torch.dtype
    on_host: bool
    splits: Sequence[CalibrationSettings]
    state: Unfinished
    kept_bytes: int


@dataclass(frozen=True)
class Job:
    """What every stage of a recovery works with.

    Attributes:
        settings: what was decided.
        dense: the dense model, as an entered context; its parameters end as they were.
        train: the text to fit to.
        validation: the text that decides, and is never fitted to.
        saved: the folder where a stage keeps what it found, and finds what an interrupted run kept.
        group: the processes that recover together.
        notify: the listener for events.
    """

    settings: RecoverySettings
    dense: SkippableModel
    train: Calibration
    validation: Calibration
    saved: Path
    group: ProcessGroup = field(default_factory=ProcessGroup)
    notify: Notify = ignore


Fields = Callable[[LossesRecord], dict[str, Any]]
"""Returns a stage's fields of a `RecoveryRecord`, given the losses with its values."""


class Stage(ABC):
    """A way to give the kept blocks new values, with its settings.

    Attributes:
        title: what messages call it.
        model: what they call the model that has its values.
        measured: the name of that model's losses in a `ConversationsRecord`.
        streams: whether the blocks may stay in the files.
    """

    title: ClassVar[str]
    model: ClassVar[str]
    measured: ClassVar[str]
    streams: ClassVar[bool]

    def reserved_bytes(self, surgery: Surgery) -> int:
        """Return the memory to leave free when the model's place and data type are chosen."""
        return 0

    @abstractmethod
    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of memory that it takes besides the dense model, by use."""

    @abstractmethod
    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes that it keeps on the disk at most."""

    @abstractmethod
    def run(self, job: Job, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Fields]:
        """Return all new values, by the dense model's parameter names, and a function that makes their record.

        Args:
            job: the models, the texts, and the settings.
            values: the values that the stages before found.
        """


def kept_blocks(surgery: Surgery) -> list[nn.Module]:
    """Return the blocks that stay, without their weights."""
    blocks = surgery.architecture.blocks_of(surgery.architecture.skeleton)
    return [blocks[block] for block in surgery.kept.blocks]


def whole_model(dense: SkippableModel) -> Any:
    """Return the dense model with no block skipped, to write text."""
    dense.skip(())
    return dense.model
