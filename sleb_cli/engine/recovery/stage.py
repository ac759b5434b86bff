"""What is decided of a recovery before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sleb_cli.engine.forward.placement import Placement
from sleb_cli.engine.recovery.heal import HealBudget
from sleb_cli.engine.recovery.unfinished import Unfinished
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.settings import CalibrationSettings


@dataclass(frozen=True)
class RecoverySettings:
    """A recovery that is decided.

    Attributes:
        subject: the model and the removed blocks.
        closed_form: whether its blocks are refitted.
        budget: when to stop healing; None heals nothing.
        placement: where the dense model is, and in which data type it computes.
        stored: the data type to which values are rounded.
        on_host: whether hidden states wait in the memory of the CPU, because the device has too little.
        splits: the texts for training, validation and test.
        state: where what is found is kept until the output is written.
        kept_bytes: how many bytes that may still take.
    """

    subject: Subject
    closed_form: bool
    budget: HealBudget | None
    placement: Placement
    stored: torch.dtype
    on_host: bool
    splits: Sequence[CalibrationSettings]
    state: Unfinished
    kept_bytes: int
