"""What a search is, once its request has passed the door: a few values, each for a few functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.targets import Stop
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.plan import MetricRecord, Plan, TargetRecord
from sleb_cli.requests import StrategyName, journal_of
from sleb_plugins import ExpertMetric, Metric


@dataclass(frozen=True)
class SearchedModel:
    """The model, and how it runs.

    Attributes:
        architecture: the model.
        placement: where its weights are.
        memory: bytes for the search in addition to the model; None for a share of what is free.
        batch_size: sequences in a batch; None chooses by the device.
    """

    architecture: Architecture
    placement: Placement
    memory: int | None
    batch_size: int | None


@dataclass(frozen=True)
class Method:
    """How blocks are chosen.

    Attributes:
        metric: scores the candidates.
        implementation: what its scores depend on besides the model and the text.
        strategy_name: the search strategy.
        removable: which blocks may go.
        fast: whether candidates race.
        holdout: the share of the sequences that is held out.
        stop: returns when the search ends, given the dense model, which a speed-up is timed on.
    """

    metric: Metric
    implementation: MetricRecord
    strategy_name: StrategyName
    removable: Removable
    fast: bool
    holdout: float
    stop: Callable[[Any], Stop]


@dataclass(frozen=True)
class ExpertMethod:
    """How experts are chosen.

    Attributes:
        metric: scores the experts of a block.
        implementation: what its scores depend on besides the model and the text.
        fewer: how many of each block go.
        holdout: the share of the sequences that is held out.
        target: the size to reach, unless a number of experts is given.
    """

    metric: ExpertMetric
    implementation: MetricRecord
    fewer: int
    holdout: float
    target: TargetRecord | None
    strategy_name: ClassVar[StrategyName] = "oneshot"


@dataclass(frozen=True)
class Recording:
    """The files of a search, and the options and versions recorded in them.

    Attributes:
        plan_file: where the plan goes; the journal beside it keeps every score until then.
        resume: whether an unfinished search is continued.
        options: the options that repeat the search, by field, where they have a value.
        plugins: the versions of other packages that offer plugins.
        sample_tokens: how many tokens both models generate at the end.
    """

    plan_file: Path
    resume: bool
    options: Mapping[str, Any]
    plugins: Mapping[str, str]
    sample_tokens: int

    @property
    def journal(self) -> Path:
        """The file of the scores."""
        return journal_of(self.plan_file)


@dataclass(frozen=True)
class Search:
    """A search after every check that needs no weights.

    Attributes:
        model: the model.
        text: the calibration text.
        method: how blocks or experts are chosen.
        extended: the plan that is continued, if any.
        recording: the files, and what is recorded in them.
    """

    model: SearchedModel
    text: CalibrationSettings
    method: Method | ExpertMethod
    extended: Plan | None
    recording: Recording
