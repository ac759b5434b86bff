"""What a search is, once its request has passed the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.engine.forward.placement import Placement
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.strategies import STRATEGIES, Strategy
from sleb_cli.engine.search.targets import Target
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.plan import MetricRecord, Plan
from sleb_cli.requests import StrategyName
from sleb_plugins import Metric


@dataclass(frozen=True)
class SearchSettings:
    """A search after every check that needs no weights.

    Attributes:
        architecture: the model.
        placement: where its weights are.
        text: the calibration text.
        metric: scores the candidates.
        implementation: what its scores depend on besides the model and the text.
        strategy_name: how blocks are chosen.
        removable: which blocks may go.
        target: when to stop; None until the model is timed, for a speed-up.
        remove: the largest possible number of removals.
        options: the options that repeat the search, by field, where they have a value.
        plan_file: where the plan is written, and beside it the journal.
        resume: whether an unfinished search is continued.
        extended: the plan that is continued, if any.
        speedup: how many times as fast the model is to be, if that is the target.
        fast: whether candidates race.
        holdout: the share of the sequences that is held out.
        sample_tokens: how many tokens both models generate at the end.
        memory: bytes for the search in addition to the model; None for a share of what is free.
        batch_size: sequences in a batch; None chooses by the device.
        plugins: the versions of other packages that offer plugins.
    """

    architecture: Architecture
    placement: Placement
    text: CalibrationSettings
    metric: Metric
    implementation: MetricRecord
    strategy_name: StrategyName
    removable: Removable
    target: Target | None
    remove: int
    options: Mapping[str, Any]
    plan_file: Path
    resume: bool
    extended: Plan | None
    speedup: float | None
    fast: bool
    holdout: float
    sample_tokens: int
    memory: int | None
    batch_size: int | None
    plugins: Mapping[str, str]

    @property
    def gone(self) -> tuple[int, ...]:
        """The blocks that the extended plan removes."""
        return self.extended.removals if self.extended else ()

    @property
    def strategy(self) -> Strategy:
        """The search strategy."""
        return STRATEGIES[self.strategy_name]
